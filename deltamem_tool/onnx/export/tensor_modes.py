"""Replace calls that torch's exporter cannot represent by equivalent ones, while a model is traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ROUTED = {"top_k_index", "top_k_weights"}  # arguments that identify modules of experts
_COUNTS = ("total_experts", "num_experts")  # attributes with the number of experts


class ExportableCalls(TorchFunctionMode):
    """Replace calls that the exporter's operators do not support inside the block.

    Indexing complex numbers becomes indexing their real and imaginary parts. Squeezing an axis whose size is not 1 is
    left out: torch ignores it, but ONNX rejects it.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute `function`."""
        if function is Tensor.__getitem__ and torch.is_complex(args[0]):
            numbers, part = args
            return torch.complex(numbers.real[part], numbers.imag[part])
        if (
            function is Tensor.squeeze
            and len(args) == 2
            and isinstance(size := args[0].shape[args[1]], int)
            and size != 1
        ):
            return args[0]
        return function(*args, **(kwargs or {}))


class _AllExperts(TorchFunctionMode):
    """Make a loop over the experts that tokens have chosen run over all experts, inside the block.

    The chosen ones are not known while a model is traced, and an expert without tokens adds nothing.

    Args:
        experts: number of experts.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self._experts = experts

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute `function`."""
        if function in (Tensor.nonzero, torch.nonzero) and args[0].ndim == 1:
            return np.arange(self._experts)[:, None]  # [experts, 1], with known values
        result = function(*args, **(kwargs or {}))
        if function is Tensor.numel and not isinstance(result, int):
            return 1  # models skip experts without tokens
        return result


@contextmanager
def run_every_expert(model: nn.Module) -> Iterator[None]:
    """Make modules of experts compute with all their experts inside the block."""

    def run(forward: Callable[..., Any], count: int, *args: Any, **kwargs: Any) -> Any:
        with _AllExperts(count):
            return forward(*args, **kwargs)

    counts = {part: _count(part) for part in model.modules()}
    own = {part: vars(part).get("forward") for part, count in counts.items() if count}
    for part in own:
        vars(part)["forward"] = partial(run, part.forward, counts[part])
    try:
        yield
    finally:
        for part, forward in own.items():
            del vars(part)["forward"]
            if forward is not None:
                vars(part)["forward"] = forward


def _count(module: nn.Module) -> int:
    """Return the number of experts of `module`; 0 if it is not a module of experts."""
    if not inspect.signature(module.forward).parameters.keys() >= _ROUTED:
        return 0
    return next((count for name in _COUNTS if (count := getattr(module, name, 0))), 0)
