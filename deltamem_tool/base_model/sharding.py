"""Weights that tensor parallelism or FSDP2 has split over processes, as torch's DTensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_split(weight: Any) -> TypeGuard[DTensor]:
    """Return whether `weight` is split over processes."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False  # saves the import below, which takes a second
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def is_tensor_parallel(model: nn.Module) -> bool:
    """Return whether processes compute each layer of `model` together, as in tensor parallelism but not in FSDP2."""
    if not any(is_split(weight) for weight in model.parameters()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return not any(isinstance(module, FSDPModule) for module in model.modules())


def full_tensor(weight: Tensor) -> Tensor:
    """Return all of `weight`. If it is split, every process must call this."""
    return weight.full_tensor() if is_split(weight) else weight


def local_part(rows: Tensor, weight: DTensor) -> Tensor:
    """Return this process's part of `rows`, a tensor with one row for each row of `weight`."""
    from torch.distributed.tensor import distribute_tensor

    rows = rows.to(weight.device)
    return distribute_tensor(rows, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
