"""Checks on all items of a task, the choice of histories that stand in for others, and a digest of the items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.conditions import MEAN_OF
from deltamem_tool.evaluation.task import Item


def check(items: Sequence[Item]) -> None:
    """Reject items that could be confused.

    Raises:
        DataError: two items have the same name, or two histories do.
    """
    seen: dict[str, Item] = {}
    histories: dict[str, Item] = {}
    for item in items:
        first = seen.setdefault(item.id, item)
        owner = histories.setdefault(item.history_id, item)
        if first is not item or _memory_inputs(owner) != _memory_inputs(item):
            other = first if first is not item else owner
            name = item.id if first is not item else item.history_id
            problem = f"{item.where} and {other.where} have the same name, {name!r}."
            raise DataError(problem, "Their answers would be mixed up.", "Give each its own name.")


def digest_of(items: Sequence[Item], everyone: Sequence[Item], others: Mapping[str, Sequence[str]]) -> str:
    """Return the SHA-256 of everything that is asked, including the histories.

    A limit may leave out items of `others`, which are still among `everyone`'s.
    """
    asked_histories = {item.history_id for item in items}
    written = asked_histories.union(*(others[name] for name in asked_histories))
    digest = hashlib.sha256()
    for name, history in {
        item.history_id: _memory_inputs(item) for item in everyone if item.history_id in written
    }.items():
        digest.update(json.dumps([name, *history]).encode())
    for item in items:
        digest.update(
            json.dumps([item.id, item.history_id, item.question, item.answers, item.query, item.new_tokens]).encode()
        )
    return digest.hexdigest()


def _memory_inputs(item: Item) -> list[Any]:
    """Return everything that an item's memory is written from."""
    return [list(item.history), *([item.template_kwargs] if item.template_kwargs else [])]


def other_histories(items: Sequence[Item]) -> dict[str, list[str]]:
    """Return the histories that replace each one: the next ones, `MEAN_OF` or all. The first of them is its donor.

    Raises:
        DataError: there are fewer than two histories.
    """
    histories = list(dict.fromkeys(item.history_id for item in items))
    if len(histories) < 2:
        raise DataError(
            f"{len(histories)} history is too few for an evaluation." if histories else "There is nothing to ask.",
            "The control uses the memory of another history.",
            "Use two histories or more.",
        )
    count, around = min(MEAN_OF, len(histories) - 1), histories * 2
    return {name: around[place : place + count] for place, name in enumerate(histories, start=1)}
