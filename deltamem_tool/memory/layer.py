"""The module of one attention layer. It takes hidden states and a state, and returns readings and the next state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.memory.corrections import Corrections
from deltamem_tool.ops.gates import gates, normalise, per_head, write_inputs
from deltamem_tool.ops.recurrent import delta_step
from deltamem_tool.ops.scan import delta_scan, full_precision, read_state
from deltamem_tool.ops.segment_sums import segment_means, segment_sums, segment_terms

# A token's gradient fades as what it wrote does: at λ = 0.82, 450 tokens later, it is in float32's denormals, where a
# CPU's matrix products take many times as long; the base's backward pass is made of them. Adam squares gradients:
# below 1e-19 they are zeros to it.
GRADIENT_FLOOR = 1e-25


class LayerOutput(NamedTuple):
    """The results of one call of a layer."""

    readings: Tensor  # [B, T, H·R]
    state: Tensor  # [B, H, R, R] after the last token
    open_segment: Tensor | None  # [B, W], open after the last token; None where every token writes
    write_gates: Tensor | None  # β [B, T, H, R] (or 1 for R), zero where nothing is written; None if nothing is at all


class DeltaMemLayer(Corrections):
    """The projections, gates and corrections of one layer (arXiv 2605.12357, sections 3.1 to 3.3).

    It computes in float32, whatever dtype its weights have been cast to.

    Shapes: hidden states `[B, T, D]`; state `[B, H, R, R]`, indexed [value row, key column]; readings `[B, T, H·R]`;
    open segment `[B, W]` with W = `config.segment_width`, the sums over its tokens and their number.

    Args:
        config: the mechanism.
        hidden_size: D.
        out_features: output width of each corrected projection, by branch.
    """

    def __init__(self, config: DeltaMemConfig, hidden_size: int, out_features: Mapping[str, int]) -> None:
        super().__init__(config)
        width = config.state_heads * config.rank

        def linear(wide: int, out: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(wide, out, bias=bias, dtype=torch.float32)

        self.query = linear(hidden_size, width)
        self.key = linear(hidden_size, width)
        self.value = linear(hidden_size, width)
        self.gate = linear(hidden_size, config.gate_width, bias=True)  # β's pre-activation
        self.decay = None if config.couple_lambda else linear(hidden_size, config.gate_width, bias=True)  # λ's
        self.add_corrections(out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights as the paper does."""
        for projection in (self.query, self.key, self.value):
            nn.init.kaiming_uniform_(projection.weight, a=math.sqrt(5))
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, self.config.beta_bias)
        if self.decay is not None:
            nn.init.zeros_(self.decay.weight)
            nn.init.constant_(self.decay.bias, -self.config.beta_bias)
        self.reset_corrections()

    def forward(
        self,
        hidden: Tensor,
        state: Tensor,
        read_mask: Tensor | None,
        write_mask: Tensor | bool,
        open_segment: Tensor | None = None,
        segment_end: Tensor | None = None,
    ) -> LayerOutput:
        """For every token, read from the state before it, then write.

        Args:
            hidden: `[B, T, D]`, the input of self-attention.
            state: `[B, H, R, R]` before the first token.
            read_mask: bool `[B, T]`, the tokens that read (others get zeros); None for all.
            write_mask: bool `[B, T]`, the tokens that write or belong to a segment; True for all, False for none, which
                leaves state and open segment unchanged.
            open_segment: `[B, W]`, the sums before the first token; None if every token writes.
            segment_end: bool `[B, T]`, the tokens that end a segment, all of them in `write_mask`; None for none.
        """
        x = hidden.float()
        if x.shape[1] == 1 and read_mask is None and write_mask is True and segment_end is None:
            return self._decode(x, state, open_segment)
        if read_mask is not None:
            # A padding token's numbers can be inf or NaN, which no mask takes out of a product.
            x = x.masked_fill(~(read_mask | write_mask)[:, :, None], 0.0)
        write = None
        with full_precision(x.device):
            if write_mask is False:
                readings = read_state(state, normalise(per_head(self.query(x), self.config)))
            else:
                query_key, *raw = self._project(x)
                if open_segment is None:
                    q, k = normalise(query_key.view(*x.shape[:-1], 2, *state.shape[1:3])).unbind(-3)
                else:
                    query, key = query_key.chunk(2, dim=-1)
                    widths = [part.shape[-1] for part in (key, *raw)]
                    added = segment_terms((key, *raw))
                    if isinstance(write_mask, Tensor):
                        added = added * write_mask.unsqueeze(-1)
                    sums, open_segment = segment_sums(added, segment_end, open_segment)
                    key, *raw = torch.split(segment_means(sums)[0], widths, dim=-1)
                    q, k = (normalise(per_head(part, self.config)) for part in (query, key))
                    write_mask = False if segment_end is None else segment_end
                if write_mask is False:  # no segment ends
                    readings = read_state(state, q)
                else:
                    v, log_keep, erase, write = write_inputs(self.config, raw)
                    if isinstance(write_mask, Tensor):
                        mask = write_mask[:, :, None, None].to(x.dtype)
                        log_keep, erase, write = log_keep * mask, erase * mask, write * mask
                    readings, state = delta_scan(q, k, v, log_keep, erase, write, state)
        if read_mask is not None:
            readings = readings * read_mask[:, :, None, None].to(x.dtype)
        return LayerOutput(readings.flatten(2), state, open_segment, write)

    def _decode(self, x: Tensor, state: Tensor, open_segment: Tensor | None) -> LayerOutput:
        """Do what `forward` does, for one token `[B, 1, D]` that reads, and writes or joins the open segment."""
        with full_precision(x.device):
            query_key, *raw = self._project(x)
            if open_segment is not None:  # nothing is written yet
                query, key = query_key.chunk(2, dim=-1)
                readings = read_state(state, normalise(per_head(query, self.config)))
                return LayerOutput(readings.flatten(2), state, open_segment + segment_terms((key, *raw))[:, 0], None)
            q_k = normalise(query_key.view(-1, 2, *state.shape[1:3])).permute(0, 2, 3, 1)  # [B, H, R, 2]
            heads = state.shape[1]
            value, *raw = (part.view(-1, heads, part.shape[-1] // heads, 1) for part in raw)
            keep, erase, write = gates(self.config, *raw)
            reading, state = delta_step(q_k, value, keep, erase, write, state)
            return LayerOutput(reading.reshape(len(x), 1, -1), state, None, write.mT)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Pre-activations: query and key side by side `[B, T, 2·H·R]`, value `[B, T, H·R]`, gates `[B, T, ·]`."""
        gates = (self.gate,) if self.decay is None else (self.gate, self.decay)
        width = self.config.state_heads * self.config.rank
        # One product: joining the weights costs less than a call for each of them.
        weights = [self.query.weight, self.key.weight, self.value.weight, *(gate.weight for gate in gates)]
        raw = F.linear(x, torch.cat(weights).float())
        if raw.requires_grad and not torch.compiler.is_compiling():
            raw.register_hook(_without_traces)  # type: ignore[no-untyped-call]  # of torch
        parts = torch.split(raw, [2 * width, width, *(gate.out_features for gate in gates)], dim=-1)
        return *parts[:2], *(part + gate.bias.float() for part, gate in zip(parts[2:], gates, strict=True))


def end_segment(config: DeltaMemConfig, state: Tensor, open_segment: Tensor) -> tuple[Tensor, Tensor]:
    """Write the open segment and start a new one. A row whose segment has no tokens does not change.

    Takes the state `[B, H, R, R]` and the open segment `[B, W]` of one layer, and returns both after the write.
    """
    rows = config.state_heads * config.rank
    widths = [rows, rows, config.gate_width, *([] if config.couple_lambda else [config.gate_width])]
    with full_precision(state.device):
        values, tokens = segment_means(open_segment)
        key, *raw = torch.split(values.unsqueeze(1), widths, dim=-1)
        k = normalise(per_head(key, config))
        v, log_keep, erase, write = write_inputs(config, raw)
        mask = (tokens > 0)[:, None, None].to(state.dtype)  # [B, 1, 1, 1]
        _, state = delta_scan(k, k, v, log_keep * mask, erase * mask, write * mask, state)
    return state, torch.zeros_like(open_segment)


def _without_traces(gradient: Tensor) -> Tensor:
    """Zero where it is too small to matter, see `GRADIENT_FLOOR`."""
    return gradient.masked_fill(gradient.abs() < GRADIENT_FLOOR, 0.0)
