"""A Llama-style decoder with δ-mem, written out in float64, a token at a time: no hooks, no scan, no module of ours.

It is what the equations say (arXiv 2605.12357), and knows the model by its weights' names alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltamem_tool.surgery import adapter_of


def naive_run(
    model: PreTrainedModel,
    ids: list[int],
    states: dict[int, Tensor] | None = None,
    writes: list[bool] | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits `[T, V]` and states `[H, R, R]` by layer after one conversation; `states` is where it starts."""
    adapter, config = adapter_of(model), model.config
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    memories = {name: weight.detach().double() for name, weight in adapter.state_dict().items()}
    options = adapter.config
    states = {layer: state.double().clone() for layer, state in (states or {}).items()}
    writes = writes or [True] * len(ids)
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        prefix = f"layers.{layer}."
        memory = {n.removeprefix(prefix): w for n, w in memories.items() if n.startswith(prefix)}
        hidden = _rms_norm(x, own["input_layernorm.weight"], config.rms_norm_eps)
        corrections: dict[str, list[Tensor]] = {branch: [] for branch in options.heads}
        if memory:
            state = states.get(layer, torch.zeros(options.state_heads, options.rank, options.rank, dtype=torch.float64))
            for token, write in zip(hidden, writes, strict=True):
                reading, state = _memory_step(token, state, memory, options, write)
                for branch in options.heads:
                    corrections[branch].append(
                        options.alpha / options.rank * memory[f"delta.{branch}.weight"] @ reading
                    )
            states[layer] = state
        steer = {branch: torch.stack(values) for branch, values in corrections.items() if values}
        x = x + _attention(hidden, own, config, layer, steer)
        hidden = _rms_norm(x, own["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = hidden @ own["mlp.gate_proj.weight"].T, hidden @ own["mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ own["mlp.down_proj.weight"].T
    x = _rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    return x @ weights["lm_head.weight"].T, states


def _memory_step(x: Tensor, state: Tensor, weights: dict[str, Tensor], options, write: bool) -> tuple[Tensor, Tensor]:
    """One token: the reading `[H·R]` from before it, and the state after it."""
    rank = options.rank
    raw = {name: weights[f"{name}.weight"] @ x for name in ("query", "key", "value", "gate")}
    raw["gate"] = raw["gate"] + weights["gate.bias"]
    readings, after = [], state.clone()
    for head in range(options.state_heads):
        q, k, v, z = (raw[name][head * rank : (head + 1) * rank].tolist() for name in ("query", "key", "value", "gate"))
        q, k = _unit(q), _unit(k)
        old = state[head].tolist()
        for i in range(rank):
            readings.append(sum(old[i][j] * q[j] for j in range(rank)))
            beta = 1 / (1 + math.exp(-z[i]))
            keep, erase = {
                "standard": (1 - beta, beta),
                "lambda_outside": (1 - beta, (1 - beta) * beta),
                "no_lambda": (1.0, beta),
            }[options.update_rule]
            predicted = sum(old[i][j] * k[j] for j in range(rank))
            for j in range(rank):
                if write:
                    after[head, i, j] = keep * old[i][j] - erase * predicted * k[j] + beta * v[i] * k[j]
    return torch.tensor(readings, dtype=torch.float64), after


def _unit(values: list[float]) -> list[float]:
    values = [math.tanh(value) for value in values]
    length = math.sqrt(sum(value * value for value in values) + 1e-6)
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
