"""A Llama-style decoder with δ-mem, written out in float64, one token at a time: no hooks, no scan, no module of ours.

It implements the equations (arXiv 2605.12357), and uses only the model's weights, by their names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltamem_tool.memory.attach import adapter_of

# The role of a token in the segments of a text.
OUTSIDE, INSIDE, LAST = 0, 1, 2


def naive_run(
    model: PreTrainedModel,
    ids: list[int],
    states: dict[int, Tensor] | None = None,
    writes: list[bool] | None = None,
    tags: list[int] | None = None,
    end: bool = False,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits `[T, V]` and states `[H, R, R]` by layer after one conversation.

    Args:
        states: the initial states, with no segment open.
        writes: which tokens write; the others only read.
        tags: OUTSIDE, INSIDE or LAST of every token. Without them, a token is a segment of its own where the adapter
            writes token by token, and belongs to one that does not end where it writes by segments.
        end: the segment that is open after the last token ends there.
    """
    adapter, config = adapter_of(model), model.config
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    memories = {name: weight.detach().double() for name, weight in adapter.state_dict().items()}
    options = adapter.config
    states = {layer: state.double().clone() for layer, state in (states or {}).items()}
    writes = writes or [True] * len(ids)
    tags = tags or [LAST if options.granularity == "token" else INSIDE] * len(ids)
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        prefix = f"layers.{layer}."
        memory = {n.removeprefix(prefix): w for n, w in memories.items() if n.startswith(prefix)}
        hidden = _rms_norm(x, own["input_layernorm.weight"], config.rms_norm_eps)
        steer: dict[str, Tensor] = {}
        if memory:
            state = states.get(layer, torch.zeros(options.state_heads, options.rank, options.rank, dtype=torch.float64))
            readings, segment = [], []
            for token, write, tag in zip(hidden, writes, tags, strict=True):
                readings.append(_read(token, state, memory, options))
                if write and tag != OUTSIDE:
                    segment.append(token)
                    if tag == LAST:
                        state, segment = _write(sum(segment) / len(segment), state, memory, options), []
            if end and segment:
                state = _write(sum(segment) / len(segment), state, memory, options)
            states[layer] = state
            for branch in options.branches:
                steer[branch] = torch.stack([_correction(branch, reading, memory, options) for reading in readings])
        x = x + _attention(hidden, own, config, layer, steer)
        hidden = _rms_norm(x, own["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = hidden @ own["mlp.gate_proj.weight"].T, hidden @ own["mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ own["mlp.down_proj.weight"].T
    x = _rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    return x @ weights["lm_head.weight"].T, states


def _read(x: Tensor, state: Tensor, weights: dict[str, Tensor], options) -> Tensor:
    """The reading `[H·R]` of one token."""
    rank, readings = options.rank, []
    raw = (weights["query.weight"] @ x).tolist()
    for head, old in enumerate(state.tolist()):
        q = _unit(raw[head * rank : (head + 1) * rank])
        readings += [sum(old[i][j] * q[j] for j in range(rank)) for i in range(rank)]
    return torch.tensor(readings, dtype=torch.float64)


def _write(x: Tensor, state: Tensor, weights: dict[str, Tensor], options) -> Tensor:
    """The state after one write of `x`: a token, or the mean of a segment's tokens."""
    rank, after = options.rank, state.tolist()
    key, value = ((weights[f"{name}.weight"] @ x).tolist() for name in ("key", "value"))
    beta = torch.sigmoid(weights["gate.weight"] @ x + weights["gate.bias"]).tolist()
    own = None
    if not options.couple_lambda:
        own = torch.sigmoid(weights["decay.weight"] @ x + weights["decay.bias"]).tolist()
    for head, old in enumerate(state.tolist()):
        k, v = _unit(key[head * rank : (head + 1) * rank]), value[head * rank : (head + 1) * rank]
        for i in range(rank):
            gate = {"row": head * rank + i, "head": head}[options.gates]
            b = beta[gate]
            decay = 1 - b if own is None else own[gate]
            keep, erase = {
                "standard": (decay, b),
                "lambda_outside": (decay, decay * b),
                "no_lambda": (1.0, b),
            }[options.update_rule]
            predicted = sum(old[i][j] * k[j] for j in range(rank))
            for j in range(rank):
                after[head][i][j] = keep * old[i][j] - erase * predicted * k[j] + b * v[i] * k[j]
    return torch.tensor(after, dtype=torch.float64)


def _correction(branch: str, reading: Tensor, weights: dict[str, Tensor], options) -> Tensor:
    """The correction that a reading adds to a branch: scaled, and for the branch o normalised afterwards."""
    steer = options.alpha / options.rank * weights[f"delta.{branch}.weight"] @ reading
    if options.delta_scale != "fixed":
        raw = weights["scale_raw"][{"layer": 0, "branch": "qkvo".index(branch)}[options.delta_scale]].item()
        steer = steer * options.delta_scale_max / (1 + math.exp(-raw))
    if branch == "o" and options.o_norm:
        steer = _rms_norm(steer, weights["o_norm.weight"], options.o_norm_eps)
    return steer


def _unit(values: list[float]) -> list[float]:
    values = [math.tanh(value) for value in values]
    length = max(math.sqrt(sum(value * value for value in values)), 1e-6)
    return [value / length for value in values]


def _attention(hidden: Tensor, own: dict[str, Tensor], config, layer: int, steer: dict[str, Tensor]) -> Tensor:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parts = {}
    for branch in "qkv":
        part = hidden @ own[f"self_attn.{branch}_proj.weight"].T + steer.get(branch, 0)
        part = part.view(len(hidden), -1, head_dim)
        if f"self_attn.{branch}_norm.weight" in own:
            part = _rms_norm(part, own[f"self_attn.{branch}_norm.weight"], config.rms_norm_eps)
        if branch != "v" and getattr(config, "no_rope_layers", [1] * (layer + 1))[layer]:
            part = _rotate(part, config.rope_parameters["rope_theta"])
        parts[branch] = part
    heads = []
    for head in range(config.num_attention_heads):
        group = head * config.num_key_value_heads // config.num_attention_heads
        scores = parts["q"][:, head] @ parts["k"][:, group].T / math.sqrt(head_dim)
        later = torch.ones_like(scores).triu(1).bool()
        heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ parts["v"][:, group])
    return torch.cat(heads, dim=-1) @ own["self_attn.o_proj.weight"].T + steer.get("o", 0)


def _rotate(x: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None, None] / theta ** (torch.arange(half).double() / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight
