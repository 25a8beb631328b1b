"""Make selections by `topk`, such as the tokens that attention sees, work in a graph as in PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


@contextmanager
def dynamic_topk(model: PreTrainedModel) -> Iterator[None]:
    """Make `model` select `min(most, columns)` columns for any number of columns, inside the block.

    Python's `min` would compare the two while the model is traced, and fix the result.
    """
    modules = [sys.modules[name] for name in {type(part).__module__ for part in model.modules()}]
    modules = [module for module in modules if "min" not in vars(module)]
    for module in modules:
        vars(module)["min"] = dynamic_min
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["min"]


def dynamic_min(*values: Any, **kwargs: Any) -> Any:
    """Compute `min`, also of two sizes that are not known while the model is traced."""
    sizes = len(values) == 2 and any(isinstance(value, torch.SymInt) for value in values)
    if sizes:
        return torch.sym_min(*values)  # type: ignore[no-untyped-call]
    return min(*values, **kwargs)


class StableTopK(TorchFunctionMode):
    """Make `topk` select the first of equal values, as ONNX specifies; PyTorch may select any of them.

    An indexer's scores are often equal, because they are zero if none of its heads has a positive score.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or the replacement of `topk`."""
        return (_first_largest if func in (torch.topk, Tensor.topk) else func)(*args, **(kwargs or {}))


def _first_largest(
    input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    found = torch.sort(input, dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((found.values.narrow(dim, 0, k), found.indices.narrow(dim, 0, k)))
