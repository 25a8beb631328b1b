"""Split an evaluation over the processes that `accelerate launch` or torchrun has started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # reports of evaluations are compared without torch
    from transformers import PreTrainedModel

_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """The processes of an evaluation, and the number of this one.

    Args:
        number: number of this process, from 0.
        count: number of processes.
        share: whether each process asks a share of the questions. If not, all ask everything together, as when they
            share the weights of the base model.
    """

    number: int = 0
    count: int = 1
    share: bool = True

    @classmethod
    def from_model(cls, model: PreTrainedModel | None) -> Processes:
        """Return the processes of the process group, if there is one, that evaluate `model`; None is an ONNX folder."""
        import torch

        from deltamem_tool.base_model.sharding import is_split

        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return cls()
        together = model is not None and any(is_split(weight) for weight in model.parameters())
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size(), share=not together)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reports."""
        return self.number == 0

    def part(self, items: Sequence[_T]) -> Sequence[_T]:
        """Return this process's share of `items`."""
        return items[self.number :: self.count] if self.share else items

    def all(self, value: _T) -> list[_T]:
        """Return the `value` of every process that has its own, in order, after waiting for all of them."""
        if self.count == 1 or not self.share:
            return [value]
        import torch

        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def from_main(self, value: _T) -> _T:
        """Return the `value` of the first process."""
        if self.count == 1:
            return value
        import torch

        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]


ALONE = Processes()
