"""Validation during training: loss and recall with the state, with zeros, and with another conversation's state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_tool.errors import ConfigError

Item = TypeVar("Item")


class StepModel(Protocol):
    """A training step that can be evaluated."""

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions under which answers are scored."""

    def views(self, batch: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield logits `[N, V]` at the batch's scored positions, one condition after another."""


def batches_of(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Split into batches of `size`, in order. The last one may have one more, since every conversation needs a donor.

    Raises:
        ConfigError: there are fewer than two conversations.
    """
    if len(items) < 2:
        raise ConfigError(
            "Evaluation needs at least two conversations.",
            "Its control is another conversation's memory.",
            "Set training.eval_episodes to two or more, and provide at least two conversations.",
        )
    size = max(2, size)
    starts = list(range(0, len(items) - 1, size))
    return [items[start:end] for start, end in zip(starts, [*starts[1:], len(items)], strict=True)]


@torch.no_grad()
def outcomes(model: StepModel, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return sums over `batches`, each of two conversations or more, by condition.

    A sum `[4]` consists of the cross-entropy of the scored tokens, the number of these tokens, the number of exchanges
    in which every scored token is the most likely one, and the number of exchanges. An exchange in which every scored
    token is the most likely one is one that greedy decoding would have answered word for word.
    """
    total = {condition: torch.zeros(4, dtype=torch.float32) for condition in model.conditions}
    for batch in batches:
        exchange = batch["scored"] // batch["labels"].shape[1]
        count = len(batch["labels"])
        for condition, logits in model.views(batch):
            loss = F.cross_entropy(logits.float(), batch["targets"], reduction="sum")
            wrong = torch.zeros(count, dtype=torch.float32, device=logits.device)
            wrong.index_add_(0, exchange, (logits.argmax(-1) != batch["targets"]).float())
            sums = (loss.item(), len(exchange), (wrong == 0).sum().item(), count)
            total[condition] += torch.tensor(sums, dtype=torch.float32)
    return total


def metrics(total: Mapping[str, Tensor]) -> dict[str, float]:
    """Return `eval_loss` and `eval_recall` (the share of exchanges answered word for word), by condition."""
    figures = {}
    for condition, sums in total.items():
        loss, tokens, right, exchanges = sums.tolist()
        figures[f"eval_loss{condition}"] = loss / tokens
        figures[f"eval_recall{condition}"] = right / exchanges
    return figures
