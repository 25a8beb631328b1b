"""Fake tensors: PyTorch's stand-ins that have a shape and a dtype, and no numbers. A dry run computes with them."""

from __future__ import annotations

from torch import Tensor

from deltamem_tool._compat import FakeTensor


def is_fake(tensor: Tensor) -> bool:
    """Whether there are no numbers to look at."""
    return isinstance(tensor, FakeTensor)
