"""Weights that tensor parallelism or FSDP2 has split over processes, as torch's DTensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_split(weight: Any) -> TypeGuard[DTensor]:
    """Whether `weight` is split over processes."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False  # and the import below, of a second, is left out
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether processes compute each layer of `model` together: they share its weights, and not by FSDP2."""
    if not any(is_split(weight) for weight in model.parameters()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return not any(isinstance(module, FSDPModule) for module in model.modules())


def whole(weight: Tensor) -> Tensor:
    """All of `weight`, which every process has to ask for."""
    return weight.full_tensor() if is_split(weight) else weight


def local_part(rows: Tensor, weight: DTensor) -> Tensor:
    """Of something with a row for each of `weight`'s, the rows of this process."""
    from torch.distributed.tensor import distribute_tensor

    rows = rows.to(weight.device)
    return distribute_tensor(rows, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
