"""Turn the pre-activations of a layer into the inputs of the recurrence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_tool.config import L2_EPS, DeltaMemConfig


def normalise(x: Tensor) -> Tensor:
    """l2norm(tanh(x)) over the R entries."""
    x = torch.tanh(x)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp_min(L2_EPS)


def per_head(x: Tensor, config: DeltaMemConfig) -> Tensor:
    """Reshape `[..., H·n]` to `[..., H, n]`."""
    return x.view(*x.shape[:-1], config.state_heads, x.shape[-1] // config.state_heads)


def write_inputs(config: DeltaMemConfig, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn pre-activations into the write inputs of `delta_scan`, except the key.

    Args:
        config: the mechanism.
        parts: pre-activations of the value `[..., H·R]`, of β `[..., gate_width]` and, if λ has its own, of λ
            `[..., gate_width]`.

    Returns:
        v, log keep, erase, write; each `[..., H, R]`.
    """
    value, *raw = (per_head(part, config) for part in parts)
    log_keep, erase, write = gates(config, *raw, logarithm=True)
    if config.gates == "head":
        log_keep, erase, write = (gate.expand_as(value) for gate in (log_keep, erase, write))
    return value, log_keep, erase, write


def gates(
    config: DeltaMemConfig, beta: Tensor, decay: Tensor | None = None, *, logarithm: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (keep, erase, write) from pre-activations of any shape.

    β = sigmoid(beta), and λ = sigmoid(decay), or 1 − β if λ has no pre-activation of its own.

    | rule             | keep | erase | write |
    | standard (paper) | λ    | β     | β     |
    | lambda_outside   | λ    | λβ    | β     |
    | no_lambda        | 1    | β     | β     |

    Args:
        config: the mechanism.
        beta: pre-activation of β.
        decay: pre-activation of λ; None if it has none of its own.
        logarithm: return log keep instead of keep.
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
