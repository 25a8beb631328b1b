"""FSDP2 for the frozen base model: transformers shards it while loading, and each process reads its own part.

The adapter is not sharded. Every process has all of it, and its gradients are reduced as in data parallel training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from transformers import PreTrainedModel

from deltamem_tool._compat import GradientCheckpointingLayer
from deltamem_tool.base_model.sharding import is_split
from deltamem_tool.memory.state import MemoryState


@dataclass(frozen=True)
class BaseShare:
    """The share of a sharded base model that each process holds, in bytes."""

    total: int  # of the whole base
    held: int  # by the process that holds the most, while nothing computes
    processes: int


def fsdp_config(skeleton: nn.Module, processes: int, offloads: bool = False) -> dict[str, Any]:
    """Make transformers' `distributed_config` in which each decoder layer is a group of its own."""
    names = [name for name, module in skeleton.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    layers = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    return {
        "fsdp_size": processes,
        "fsdp_plan": dict.fromkeys(sorted(layers), "free_full_weight"),
        "fsdp_cpu_offload": offloads,
    }


def shard_packed(model: PreTrainedModel, device: torch.device, offloads: bool = False) -> None:
    """Shard, in place, a base model that bitsandbytes has packed to nf4 and that every process holds completely.

    Packed weights cannot be split while they load, because they have no rows yet. Their scales stay whole.
    """
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    policy: dict[str, Any] = {"offload_policy": CPUOffloadPolicy()} if offloads else {}
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)


def sharded_bytes(skeleton: PreTrainedModel, bytes_of: Mapping[Tensor, float], processes: int) -> tuple[int, int]:
    """Return the bytes of a sharded base that one of `processes` holds, and the most that it gathers to compute.

    Weights are split by rows; if they do not divide evenly, the first process has one row more. Layers are freed once
    they have run, but each is gathered while the previous one runs. The output head is kept.
    """
    held = sum(math.ceil(w.shape[0] / processes) / w.shape[0] * size for w, size in bytes_of.items())
    layers = [module for module in skeleton.modules() if isinstance(module, GradientCheckpointingLayer)]
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()  # type: ignore[no-untyped-call]
    is_tied = head is not None and embedding.weight is head.weight
    freed = [[*module.parameters()] for module in (*layers, *([] if is_tied else [embedding]))]
    sizes = [sum(bytes_of[weight] for weight in group) for group in freed]
    kept = sum(bytes_of.values()) - sum(sizes)
    if is_tied:  # transformers has FSDP gather it for the embedding and for the head
        kept += bytes_of[head.weight]
    return round(held), round(kept + 2 * max(sizes))


def is_sharded(model: nn.Module) -> bool:
    """Return whether the weights of `model` are sharded over processes."""
    return isinstance(model, FSDPModule)


def base_share(model: nn.Module) -> BaseShare:
    """Measure the share of a sharded `model` that each process holds. All processes must call this."""
    weights = list(model.parameters())
    parts = [weight.to_local() if is_split(weight) else weight for weight in weights]
    states: list[Any] = [getattr(module, "quant_state", None) for module in model.modules()]
    scales: int = sum(state.absmax.nbytes for state in states if state is not None)  # which each process has all of
    held = torch.tensor(scales + sum(part.nbytes for part in parts), device=parts[0].device)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return BaseShare(scales + sum(weight.nbytes for weight in weights), int(held), dist.get_world_size())


def pad_to_common_length(
    ids: Tensor, mask: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pad `[B, W]` on the right to the longest of all processes, so that all make the same number of calls in chunks.

    Every call gathers weights, and the processes wait for each other there.
    """
    longest = torch.tensor(ids.shape[1], device=ids.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    more = (0, int(longest) - ids.shape[1])
    mask = torch.ones_like(ids) if mask is None else mask
    return F.pad(ids, more), F.pad(mask, more), None if segments is None else F.pad(segments, more)


def pass_gradients(ends: Sequence[Tensor], memory: MemoryState) -> MemoryState:
    """Return a memory whose gradients pass through `ends`, the results of the calls that have written it.

    FSDP gathers the weights of a layer for the backward pass when the gradient of its output arrives. States leave a
    layer by another path, so the output of the last layer would get no gradient. With this, it gets zeros.
    """
    layers = list(memory.layers)
    states = _PassGradients.apply(len(ends), *ends, *(memory.layers[layer] for layer in layers))  # type: ignore[no-untyped-call]
    return MemoryState(dict(zip(layers, states, strict=True)), memory.adapter, memory.open_segments)


class _PassGradients(torch.autograd.Function):
    """`count` ends and values in, the values out; the gradients of the ends are zeros."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ends = [(end.shape, end.dtype, end.device) for end in tensors[:count]]
        return tuple(value.view_as(value) for value in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.ends]
        return None, *zeros, *gradients
