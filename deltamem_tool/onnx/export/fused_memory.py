"""The memory of one layer in as few ONNX nodes as possible.

It is traced in place of `DeltaMemLayer` if every token writes. In decoding, a node costs more than its arithmetic.

ONNX Runtime's `LinearAttention` decays, writes, and then reads, by the rule

    S' = keep S + b k (u − keep S k)ᵀ      b = erase / keep,  u = v · keep · write / erase

δ-mem reads before it writes. So every token takes two steps of the operator, called slots: *read* with its query, and
*write* with its key.

One product of the hidden states gives the inputs of both slots side by side, and a reshape turns them into steps. An
input that a slot does not use is a zero weight, or a gate that the ceiling keeps shut:

    | slot  | query and key | value | z (of β) | y (of λ = sigmoid(−y)), unless it is z    |
    | read  | query         | 0     | shut     | shut                                      |
    | write | key           | value | z        | y                                         |

The readings of the second slot are dropped. α/R and the learned scales are part of Δ. The hidden states of padding are
used as they are. Padding reads from the state, and the result is ignored. A NaN there would reach every other token
through the values of attention, with or without a memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamem_tool.config import BRANCHES, L2_EPS, DeltaMemConfig
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.layer import DeltaMemLayer, LayerOutput
from deltamem_tool.onnx.export.rewrites import LEAN_MEMORY
from deltamem_tool.onnx.export.targets import Target
from deltamem_tool.ops.onnx_scan import linear_attention

# Maximum pre-activation of a gate. In float32, e^-20 of a state is negligible beside what is written, and z and log
# keep, which should cancel, do so to 1e-6.
OPEN = 20.0
SHUT = -1e4  # its sigmoid, its exponential and its softplus are 0
UNBOUNDED = 3e38  # no ceiling
READ, WRITE, SLOTS = 0, 1, 2


def fused_memories(adapter: DeltaMemAdapter, target: Target, without: Collection[str]) -> dict[int, FusedMemory]:
    """Return the replacements of the memories of `adapter` in a graph for `target`, by layer.

    Empty if the memories cannot be replaced, or if `without` has this rewrite.
    """
    if target.fusions is None or adapter.config.granularity != "token" or LEAN_MEMORY in without:
        return {}
    constants = Constants(adapter.config)
    return {layer: FusedMemory(adapter.layer(layer), constants) for layer in adapter.layer_indices}


class Constants:
    """Constants that all memories of an adapter share, so that the graph has them once.

    Attributes:
        ceiling: `[slots, C]`, maximum pre-activations of a token that writes, where C is groups · H·R.
        shut: `[slots, C]`, maximum pre-activations of a token that does not write.
        zero, minus: `[H·R]`, 0 and −1, the bias and the factor of a softplus.
        length: `[R]`, the scale that turns an RMS norm into an L2 norm.
    """

    def __init__(self, config: DeltaMemConfig) -> None:
        self.groups = 3 if config.couple_lambda or config.update_rule == "no_lambda" else 4
        rows = config.state_heads * config.rank
        ceiling = torch.full((SLOTS, self.groups, rows), UNBOUNDED, dtype=torch.float32)
        ceiling[:, 2:] = torch.tensor([SHUT, OPEN], dtype=torch.float32)[:, None, None]
        shut = ceiling.clone()
        shut[:, 2:] = SHUT
        self.ceiling, self.shut = ceiling.flatten(1), shut.flatten(1)
        self.zero, self.minus = (torch.full((rows,), value, dtype=torch.float32) for value in (0.0, -1.0))
        self.length = torch.full((config.rank,), config.rank**-0.5, dtype=torch.float32)


class FusedMemory(nn.Module):
    """A replacement, with the same methods, for the memory of a layer in which every token writes.

    Its weights are rearranged copies.

    Args:
        memory: the memory of the layer.
        constants: constants of the adapter.
    """

    projection: Tensor
    bias: Tensor
    ceiling: Tensor
    shut: Tensor
    zero: Tensor
    minus: Tensor
    length: Tensor

    @torch.no_grad()
    def __init__(self, memory: DeltaMemLayer, constants: Constants) -> None:
        super().__init__()
        config = self.config = memory.config
        self.heads, self.rank = config.state_heads, config.rank
        self.rows = self.heads * self.rank
        gates = [self._by_row(memory.gate.weight, memory.gate.bias)]
        if constants.groups == 4:
            assert memory.decay is not None
            weight, bias = self._by_row(memory.decay.weight, memory.decay.bias)
            gates.append((-weight, -bias))
        weights = torch.zeros(SLOTS, constants.groups, self.rows, memory.query.weight.shape[1], dtype=torch.float32)
        biases = torch.zeros(weights.shape[1:3], dtype=torch.float32)
        weights[READ, 0], weights[WRITE, 0] = memory.query.weight, memory.key.weight
        weights[WRITE, 1] = memory.value.weight
        for group, (weight, biases[group]) in enumerate(gates, start=2):
            weights[WRITE, group] = weight
        self.register_buffer("projection", weights.flatten(0, 2))  # [slots·C, D]
        self.register_buffer("bias", biases.flatten())  # [C]
        for name in ("ceiling", "shut", "zero", "minus", "length"):
            self.register_buffer(name, getattr(constants, name))
        self.o_norm = memory.o_norm
        self.delta = nn.ParameterDict({branch: self._delta(memory, branch) for branch in config.branches})

    def _by_row(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias of a gate for every row of a state, `[H·R, D]` and `[H·R]`; gates may be per head."""
        copies = self.rows // len(weight)
        return weight.repeat_interleave(copies, 0), bias.repeat_interleave(copies, 0)

    def _delta(self, memory: DeltaMemLayer, branch: str) -> nn.Parameter:
        """Return Δ times all its scales, `[out, H·R]`."""
        scale = torch.tensor(memory.config.scale, dtype=torch.float32)
        if memory.scale_raw is not None:
            which = BRANCHES.index(branch) if memory.config.delta_scale == "branch" else 0
            scale = scale * torch.sigmoid(memory.scale_raw[which]) * memory.config.delta_scale_max
        return nn.Parameter(memory.delta_of(branch).weight * scale, requires_grad=False)

    def matrices(self) -> Iterator[Tensor]:
        """Yield every matrix that goes into the graph, `[out, in]`."""
        yield self.projection
        yield from self.delta.values()

    def forward(
        self, hidden: Tensor, state: Tensor, read_mask: Tensor | None, write_mask: Tensor, *segments: Tensor | None
    ) -> LayerOutput:
        """Compute the same as `DeltaMemLayer.forward`; readings are `[B, T, H·R]`.

        Padding reads too. There are no `segments`.
        """
        batch, tokens = hidden.shape[:2]
        steps = tokens * SLOTS
        x = hidden.float()
        raw = F.linear(x, self.projection).view(batch, steps, -1)
        ceiling = torch.where(write_mask[:, :, None, None], self.ceiling, self.shut).view(batch, steps, -1)
        projected = torch.minimum(raw + self.bias, ceiling)
        query_key, value, z, *decay_logits = projected.split(self.rows, dim=-1)  # type: ignore[no-untyped-call]  # of torch
        query_key = torch.tanh(query_key)
        if self.heads > 1:
            query_key = query_key.view(batch, steps, self.heads, self.rank)
        attributes = {"axis": -1, "epsilon": L2_EPS**2 / self.rank, "stash_type": 1}
        query_key = _node("SimplifiedLayerNormalization", [query_key, self.length], query_key.shape, attributes)
        value, beta, decay = self._gates(value, z, decay_logits[0] if decay_logits else z)
        if self.heads > 1:
            query_key = query_key.view(batch, steps, self.rows)
        rule, carried = "delta" if decay is None else "gated_delta", state.view(batch, self.rows, self.rank, 1)
        readings, state = linear_attention(rule, self.heads, query_key, query_key, value, carried, decay, beta)
        state = state.view(batch, self.heads, self.rank, self.rank)
        return LayerOutput(readings[:, READ::SLOTS], state, None, None)

    def _gates(self, value: Tensor, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return u, b and log keep, each `[B, slots·T, H·R]`; log keep is None if everything is kept.

        `y` is z if λ is 1 − β.
        """
        if self.config.update_rule == "no_lambda":
            return value, torch.sigmoid(z), None
        log_keep = _node("com.microsoft::LinearAttentionGate", [y, self.zero, self.minus], y.shape, version=1)
        if self.config.update_rule == "lambda_outside":
            return value, torch.sigmoid(z), log_keep
        beta = torch.exp(z) if self.config.couple_lambda else torch.sigmoid(z) * (1 + torch.exp(y))
        return value * torch.exp(log_keep), beta, log_keep

    def scale_readings(self, readings: Tensor) -> Tensor:
        """Return the readings unchanged, because Δ includes the scale."""
        return readings

    def correct(self, branch: str, readings: Tensor, output: Tensor) -> Tensor:
        """Add the correction to the `output` `[B, T, out]` of a branch's projection."""
        return output + self.correction(branch, readings).to(output.dtype)

    def correction(self, branch: str, readings: Tensor) -> Tensor:
        """Return the correction of one branch by `readings`, float32 `[B, T, out]`."""
        steer = F.linear(readings, self.delta[branch])
        return self.o_norm(steer) if branch == "o" and self.o_norm is not None else steer


def _node(
    name: str,
    inputs: list[Tensor],
    shape: torch.Size,
    attributes: dict[str, Any] | None = None,
    version: int | None = None,
) -> Tensor:
    """Return the output of a single operator for which PyTorch's exporter would write several."""
    return torch.onnx.ops.symbolic(
        name, inputs, attributes or {}, dtype=torch.float32, shape=list(shape), version=version
    )
