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

_ROUTED = {"top_k_index", "top_k_weights"}  # arguments by which experts are told from other modules
_COUNTS = ("total_experts", "num_experts")  # what such a module calls the number of them


class InOnnx(TorchFunctionMode):
    """Inside, what the exporter's operators do not cover is computed by others.

    A part of complex numbers is made of the same part of their real and imaginary ones, and an axis that is not of size
    1 is not squeezed: torch leaves it as it is, and ONNX refuses.
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


class _EveryExpert(TorchFunctionMode):
    """Inside, a loop over the experts that some token has chosen goes over all of them.

    Which ones those are is not known while a model is traced, and an expert without a token adds nothing.

    Args:
        experts: how many there are.
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
            return np.arange(self._experts)[:, None]  # [experts, 1], whose numbers are known
        result = function(*args, **(kwargs or {}))
        if function is Tensor.numel and not isinstance(result, int):
            return 1  # whether an expert has tokens is asked in order to leave it out
        return result


@contextmanager
def every_expert(model: nn.Module) -> Iterator[None]:
    """Inside, modules of experts compute with all of theirs."""

    def run(forward: Callable[..., Any], count: int, *args: Any, **kwargs: Any) -> Any:
        with _EveryExpert(count):
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
    """How many experts `module` has, 0 if it is something else."""
    if not inspect.signature(module.forward).parameters.keys() >= _ROUTED:
        return 0
    return next((count for name in _COUNTS if (count := getattr(module, name, 0))), 0)
