"""The memory of one attention layer: hidden states and a state in, readings and the next state out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamem_tool.config import BRANCHES, L2_EPS, DeltaMemConfig
from deltamem_tool.ops import delta_scan, full_precision, segment_sums
from deltamem_tool.ops.fake import is_fake

INIT_GAIN = 0.05  # the length of a column of a "base_slice" Δ, and the factor on a "random" one
BASE_SLICE_WIDTH = 8  # how many columns of Δ "base_slice" fills at most
# A token's gradient fades as what it wrote does: at λ = 0.82, 450 tokens later, it is in float32's denormals, where a
# CPU's matrix products take many times as long; the base's backward pass is made of them. Adam squares gradients:
# below 1e-19 they are zeros to it.
GRADIENT_FLOOR = 1e-25


class LayerOutput(NamedTuple):
    """What a layer's memory makes of a call."""

    readings: Tensor  # [B, T, H·R]
    state: Tensor  # [B, H, R, R] after the last token
    segment: Tensor | None  # [B, W], open after the last token; None where every token writes
    write_gates: Tensor | None  # β [B, T, H, R] (or 1 for R), zero where nothing is written; None if nothing is at all


class DeltaMemory(nn.Module):
    """One layer's projections, gates and corrections (arXiv 2605.12357, sections 3.1 to 3.3). Always float32.

    Shapes: hidden states `[B, T, D]`, state `[B, H, R, R]` indexed [value row, key column], readings `[B, T, H·R]`,
    open segment `[B, W]` with W = `config.segment_width`: what its tokens have added up, and their number.

    Args:
        config: the mechanism.
        hidden_size: D.
        out_features: output width of each corrected projection, by branch.
    """

    def __init__(self, config: DeltaMemConfig, hidden_size: int, out_features: Mapping[str, int]) -> None:
        super().__init__()
        self.config = config
        width = config.state_heads * config.rank

        def linear(wide: int, out: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(wide, out, bias=bias, dtype=torch.float32)

        self.query = linear(hidden_size, width)
        self.key = linear(hidden_size, width)
        self.value = linear(hidden_size, width)
        self.gate = linear(hidden_size, config.gate_width, bias=True)  # β's pre-activation
        self.decay = None if config.couple_lambda else linear(hidden_size, config.gate_width, bias=True)  # λ's
        self.delta = nn.ModuleDict({branch: linear(width, out_features[branch]) for branch in config.branches})
        # One raw scale, or one a branch in the order of BRANCHES; those of branches that are off stay unused.
        scales = {"fixed": 0, "layer": 1, "branch": len(BRANCHES)}[config.delta_scale]
        self.scale_raw = nn.Parameter(torch.empty(scales, dtype=torch.float32)) if scales else None
        self.o_norm = nn.RMSNorm(out_features["o"], config.o_norm_eps, dtype=torch.float32) if config.o_norm else None
        self.reset_parameters()
        self.join()

    def reset_parameters(self) -> None:
        for projection in (self.query, self.key, self.value):
            nn.init.kaiming_uniform_(projection.weight, a=math.sqrt(5))
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, self.config.beta_bias)
        if self.decay is not None:
            nn.init.zeros_(self.decay.weight)
            nn.init.constant_(self.decay.bias, -self.config.beta_bias)
        for branch in self.config.branches:
            delta = self.delta_of(branch).weight
            if self.config.delta_init == "random":
                nn.init.kaiming_uniform_(delta, a=math.sqrt(5))
                with torch.no_grad():
                    delta.mul_(INIT_GAIN)
            else:
                nn.init.zeros_(delta)
        if self.scale_raw is not None:
            share = self.config.delta_scale_init / self.config.delta_scale_max
            nn.init.constant_(self.scale_raw, math.log(share / (1 - share)))

    def _inputs(self) -> list[nn.Linear]:
        """What reads the hidden states, in the order of `_project`."""
        return [self.query, self.key, self.value, self.gate, *([] if self.decay is None else [self.decay])]

    def join(self) -> None:
        """Let the weights that read the hidden states lie side by side in `_joined`, of which each is then a part: one
        product serves them all, and nothing has to be copied for it. Moving a module takes them apart again."""
        weights = [linear.weight for linear in self._inputs()]
        # Not by `torch.cat`, which on the meta device, where folders are checked, takes seconds to be imported.
        self._joined = weights[0].detach().new_empty(sum(map(len, weights)), weights[0].shape[1])
        for weight, rows in zip(weights, self._joined.split([len(weight) for weight in weights]), strict=True):
            rows.copy_(weight.detach())
            weight.data = rows

    def _input_weight(self) -> Tensor:
        """Of all `_inputs`, `[·, D]`: the joined one, unless it must be differentiated or somebody has taken the
        weights apart."""
        weights = [linear.weight for linear in self._inputs()]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_fake(self._joined) or is_fake(weights[0]):
            return torch.cat(weights)
        address = self._joined.data_ptr()
        for weight in weights:
            if weight.data_ptr() != address:
                return torch.cat(weights)
            address += weight.nbytes
        return self._joined

    def delta_of(self, branch: str) -> nn.Linear:
        """Δ of one branch, `[out, H·R]`."""
        return cast(nn.Linear, self.delta[branch])

    @torch.no_grad()
    def start_from_base(self, columns: Mapping[str, Tensor]) -> None:
        """Fill the first columns of each Δ with the first columns of its branch's base weight, `[out, n]` by branch,
        each scaled to a fixed length (`base_slice_fixed` of the reference)."""
        for branch, weight in columns.items():
            delta = self.delta_of(branch).weight
            count = min(BASE_SLICE_WIDTH, self.config.rank, weight.shape[1])
            delta[:, :count] = F.normalize(weight[:, :count].to(delta), dim=0, eps=L2_EPS) * INIT_GAIN

    def forward(
        self,
        hidden: Tensor,
        state: Tensor,
        reads: Tensor | None,
        writes: Tensor | bool,
        segment: Tensor | None = None,
        last: Tensor | None = None,
    ) -> LayerOutput:
        """Read for every token from the state before it, then write.

        Args:
            hidden: `[B, T, D]`, what enters self-attention.
            state: `[B, H, R, R]` before the first token.
            reads: bool `[B, T]`, tokens that read (others get zeros); None for all.
            writes: bool `[B, T]`, tokens that write, or that belong to a segment; True for all, False for none, which
                leaves state and segment as they are.
            segment: `[B, W]`, the open segment before the first token; None where every token writes.
            last: bool `[B, T]`, tokens that end a segment, all of them among `writes`; None for none.
        """
        x = hidden.to(self.query.weight.dtype)
        if x.shape[1] == 1 and reads is None and writes is True and last is None:
            return self._decode(x, state, segment)
        if reads is not None:
            # A padding token's numbers can be inf or NaN, which no mask takes out of a product.
            x = x.masked_fill(~(reads | writes)[:, :, None], 0.0)
        write = None
        with full_precision(x.device):
            if writes is False:
                readings = _read(state, _normalised(_per_head(self.query(x), self.config)))
            else:
                query_key, *raw = self._project(x)
                if segment is None:
                    q, k = _normalised(query_key.view(*x.shape[:-1], 2, *state.shape[1:3])).unbind(-3)
                else:
                    query, key = query_key.chunk(2, dim=-1)
                    (key, *raw), segment = _segment_means((key, *raw), writes, last, segment)
                    q, k = (_normalised(_per_head(part, self.config)) for part in (query, key))
                    writes = False if last is None else last
                if writes is False:  # no segment ends
                    readings = _read(state, q)
                else:
                    v, log_keep, erase, write = write_inputs(self.config, raw)
                    if isinstance(writes, Tensor):
                        here = writes[:, :, None, None].to(x.dtype)
                        log_keep, erase, write = log_keep * here, erase * here, write * here
                    readings, state = delta_scan(q, k, v, log_keep, erase, write, state)
        if reads is not None:
            readings = readings * reads[:, :, None, None].to(x.dtype)
        return LayerOutput(readings.flatten(2), state, segment, write)

    def _decode(self, x: Tensor, state: Tensor, segment: Tensor | None) -> LayerOutput:
        """`forward` of one token `[B, 1, D]` that reads, and writes or joins the open segment, in as few operations as
        there can be: they cost more than the arithmetic."""
        with full_precision(x.device):
            query_key, *raw = self._project(x)
            if segment is not None:  # nothing is written yet
                query, key = query_key.chunk(2, dim=-1)
                readings = _read(state, _normalised(_per_head(query, self.config)))
                return LayerOutput(readings.flatten(2), state, segment + _counted((key, *raw))[:, 0], None)
            q_k = _normalised(query_key.view(-1, 2, *state.shape[1:3])).permute(0, 2, 3, 1)  # [B, H, R, 2]
            heads = state.shape[1]
            value, *raw = (part.view(-1, heads, part.shape[-1] // heads, 1) for part in raw)
            keep, erase, write = gates(self.config, *raw)
            reading, predicted = torch.matmul(state, q_k).split(1, dim=-1)  # [B, H, R, 1]
            change = torch.addcmul(write * value, erase, predicted, value=-1)
            state = torch.addcmul(state * keep, change, q_k[..., 1:].mT)
            return LayerOutput(reading.reshape(len(x), 1, -1), state, None, write.mT)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Pre-activations: query and key side by side `[B, T, 2·H·R]`, value `[B, T, H·R]`, gates `[B, T, ·]`. One
        product: joining the weights costs less than a call for each of them."""
        gates = (self.gate,) if self.decay is None else (self.gate, self.decay)
        width = self.config.state_heads * self.config.rank
        raw = F.linear(x, self._input_weight())
        if raw.requires_grad and not torch.compiler.is_compiling():
            raw.register_hook(_without_traces)
        parts = raw.split([2 * width, width, *(gate.out_features for gate in gates)], dim=-1)
        return *parts[:2], *(part + gate.bias for part, gate in zip(parts[2:], gates, strict=True))

    def scaled(self, readings: Tensor) -> Tensor:
        """(α/R) · r, by the layer's learned scale if there is one: the readings are scaled once, and not Δ r, which is
        far longer and once for every branch."""
        scale = self.config.scale
        return readings * (self._learned_scale(0) * scale if self.config.delta_scale == "layer" else scale)

    def correction(self, branch: str, scaled: Tensor) -> Tensor:
        """What `scaled` readings `[B, T, H·R]` add to one branch, float32 `[B, T, out]`: Δ r, by the branch's learned
        scale if there is one, and normalised if that is the o branch's way."""
        with full_precision(scaled.device):
            steer = F.linear(self._for_branch(branch, scaled), self.delta_of(branch).weight)
            return self.o_norm(steer) if branch == "o" and self.o_norm is not None else steer

    def correct(self, branch: str, scaled: Tensor, output: Tensor) -> Tensor:
        """`output` `[B, T, out]` of a branch's projection with its correction, in one pass where that can be."""
        if output.dtype != scaled.dtype or (branch == "o" and self.config.o_norm):
            return output + self.correction(branch, scaled).to(output.dtype)
        with full_precision(scaled.device):
            readings = self._for_branch(branch, scaled)
            delta = self.delta_of(branch).weight
            if readings.shape[1] == 1:
                return output + F.linear(readings, delta)
            return torch.addmm(output.flatten(0, 1), readings.flatten(0, 1), delta.mT).view(output.shape)

    def _for_branch(self, branch: str, scaled: Tensor) -> Tensor:
        return scaled * self._learned_scale(BRANCHES.index(branch)) if self.config.delta_scale == "branch" else scaled

    def _learned_scale(self, which: int) -> Tensor:
        assert self.scale_raw is not None
        return torch.sigmoid(self.scale_raw[which]) * self.config.delta_scale_max


def write_inputs(config: DeltaMemConfig, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From pre-activations to what `delta_scan` writes, but for the key.

    Args:
        parts: of the value `[..., H·R]`, of β's gate and, where λ has its own, of λ's `[..., gate_width]`.

    Returns:
        v, log keep, erase, write; each `[..., H, R]`.
    """
    value, *raw = (_per_head(part, config) for part in parts)
    log_keep, erase, write = gates(config, *raw, logarithm=True)
    if config.gates == "head":
        log_keep, erase, write = (gate.expand_as(value) for gate in (log_keep, erase, write))
    return value, log_keep, erase, write


def gates(
    config: DeltaMemConfig, beta: Tensor, decay: Tensor | None = None, *, logarithm: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(keep, erase, write) from pre-activations of any shape, with β = sigmoid(beta), and λ = sigmoid(decay), or
    1 − β where λ has none of its own; with `logarithm`, log keep.

    | rule             | keep | erase | write |
    | standard (paper) | λ    | β     | β     |
    | lambda_outside   | λ    | λβ    | β     |
    | no_lambda        | 1    | β     | β     |
    """
    write = torch.sigmoid(beta)
    opened = -beta if decay is None else decay  # λ = sigmoid(opened)
    erase = write * torch.sigmoid(opened) if config.update_rule == "lambda_outside" else write
    if config.update_rule == "no_lambda":
        keep = torch.zeros_like(beta) if logarithm else torch.ones_like(beta)
    else:
        # Not logsigmoid: its ONNX form overflows.
        keep = -F.softplus(-opened) if logarithm else torch.sigmoid(opened)
    return keep, erase, write


def end_segment(config: DeltaMemConfig, state: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """Write what an open segment has gathered, and begin anew. A row whose segment is empty stays as it is.

    state `[B, H, R, R]` and segment `[B, W]` of one layer in; the same after the write out.
    """
    with full_precision(state.device):
        means, tokens = _means(segment)
        parts = means.unsqueeze(1).split(_part_widths(config), dim=-1)
        k = _normalised(_per_head(parts[0], config))
        v, log_keep, erase, write = write_inputs(config, parts[1:])
        here = (tokens > 0)[:, None, None].to(state.dtype)  # [B, 1, 1, 1]
        _, state = delta_scan(k, k, v, log_keep * here, erase * here, write * here, state)
    return state, torch.zeros_like(segment)


def _segment_means(
    parts: Sequence[Tensor], writes: Tensor | bool, last: Tensor | None, segment: Tensor
) -> tuple[Sequence[Tensor], Tensor]:
    """The mean of each part `[B, T, ·]` over the tokens of its segment so far: W · mean(x) is mean(W · x), so a segment
    needs no more than sums. And the segment `[B, W]` that is open afterwards."""
    widths = [part.shape[-1] for part in parts]
    counted = _counted(parts)
    if isinstance(writes, Tensor):
        counted = counted * writes.unsqueeze(-1)
    sums, segment = segment_sums(counted, last, segment)
    return _means(sums)[0].split(widths, dim=-1), segment


def _counted(parts: Sequence[Tensor]) -> Tensor:
    """What tokens add to their segment, `[B, T, W]`: their parts, and one token."""
    return torch.cat([*parts, torch.ones_like(parts[0][..., :1])], dim=-1)


def _means(sums: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., W]` to the means `[..., W - 1]` and the number of tokens `[..., 1]`."""
    tokens = sums[..., -1:]
    return sums[..., :-1] / tokens.clamp_min(1.0), tokens


def _part_widths(config: DeltaMemConfig) -> list[int]:
    rows = config.state_heads * config.rank
    return [rows, rows, config.gate_width, *([] if config.couple_lambda else [config.gate_width])]


def _read(state: Tensor, q: Tensor) -> Tensor:
    """`[B, H, R, R]` and `[B, T, H, R]` to readings `[B, T, H, R]`."""
    return torch.einsum("bhij,bthj->bthi", state, q)


def _per_head(x: Tensor, config: DeltaMemConfig) -> Tensor:
    """`[..., H·n]` to `[..., H, n]`."""
    return x.view(*x.shape[:-1], config.state_heads, x.shape[-1] // config.state_heads)


def _without_traces(gradient: Tensor) -> Tensor:
    """Zero where it is too small to matter, see `GRADIENT_FLOOR`."""
    return gradient.masked_fill(gradient.abs() < GRADIENT_FLOOR, 0.0)


def _normalised(x: Tensor) -> Tensor:
    """l2norm(tanh(x)) over the R entries."""
    x = torch.tanh(x)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(L2_EPS)
