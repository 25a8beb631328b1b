"""Waiting jobs, in one queue per tenant. The tenants take turns."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from deltamem_tool.serve.batching.job import QueueFull
from deltamem_tool.serve.batching.ticket import Ticket


class FairQueue:
    """A queue in which tenants take turns. Not thread-safe.

    Args:
        size: maximum number of waiting tickets.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._tenants: dict[str, deque[Ticket]] = {}  # in the order of their turns; no queue is empty

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

    def put(self, ticket: Ticket) -> None:
        """Add a ticket at the end of its tenant's queue.

        Raises:
            QueueFull: the queue is full.
        """
        if len(self) >= self._size:
            raise QueueFull(
                "The server is busy.", f"{self._size} requests are already waiting.", "Try again in a few seconds."
            )
        self._tenants.setdefault(ticket.job.tenant, deque()).append(ticket)

    def pop(self) -> Ticket:
        """Return the oldest ticket of the tenant whose turn it is, and pass the turn to the next tenant."""
        tenant, tickets = next(iter(self._tenants.items()))
        del self._tenants[tenant]
        ticket = tickets.popleft()
        if tickets:
            self._tenants[tenant] = tickets
        return ticket

    def forget(self, tenant: str, name: str) -> None:
        """Let the waiting jobs of a tenant that have this name share no computation: see `Job`."""
        for ticket in self._tenants.get(tenant, ()):
            if name in ticket.job.names:
                ticket.job = replace(ticket.job, prefix_key=None)

    def sweep(self, now: float) -> list[Ticket]:
        """Remove and return the tickets that are cancelled or past their deadline; with `now` infinity, all of them."""
        over = [ticket for tickets in self._tenants.values() for ticket in tickets if ticket.is_over(now)]
        for ticket in over:
            tickets = self._tenants[ticket.job.tenant]
            tickets.remove(ticket)
            if not tickets:
                del self._tenants[ticket.job.tenant]
        return over
