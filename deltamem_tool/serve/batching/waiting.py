"""Waiting jobs, in one queue per tenant. The tenants take turns."""

from __future__ import annotations

from collections import deque

from deltamem_tool.serve.batching.job import QueueFull
from deltamem_tool.serve.batching.ticket import Ticket


class FairQueue:
    """Not for several threads at once.

    Args:
        size: the most tickets that may wait.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._tenants: dict[str, deque[Ticket]] = {}  # whose turn it is comes first; none is empty

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

    def put(self, ticket: Ticket) -> None:
        """Add a ticket behind its tenant's.

        Raises:
            QueueFull: there is no room.
        """
        if len(self) >= self._size:
            raise QueueFull(
                "The server is busy.", f"{self._size} requests are already waiting.", "Try again in a few seconds."
            )
        self._tenants.setdefault(ticket.job.tenant, deque()).append(ticket)

    def pop(self) -> Ticket:
        """The oldest ticket of the tenant whose turn it is; then the next tenant has its turn."""
        tenant, tickets = next(iter(self._tenants.items()))
        del self._tenants[tenant]
        ticket = tickets.popleft()
        if tickets:
            self._tenants[tenant] = tickets
        return ticket

    def sweep(self, now: float) -> list[Ticket]:
        """Take out those that were cancelled or are late; all of them at `now` infinity."""
        gone = [ticket for tickets in self._tenants.values() for ticket in tickets if ticket.gone(now)]
        for ticket in gone:
            tickets = self._tenants[ticket.job.tenant]
            tickets.remove(ticket)
            if not tickets:
                del self._tenants[ticket.job.tenant]
        return gone
