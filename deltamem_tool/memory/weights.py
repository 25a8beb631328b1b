"""The weights of an adapter: their shapes by name, and the fingerprint that binds memories to it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.config import BRANCHES, DeltaMemConfig

Shape = tuple[int | None, ...]  # None: a size that only the base model knows


def weight_shapes(
    config: DeltaMemConfig, hidden_size: int | None = None, out_features: Mapping[str, int] | None = None
) -> dict[str, Shape]:
    """Return the shapes of a `DeltaMemLayer`'s weights, in the order of its state dict.

    Args:
        config: options of the mechanism.
        hidden_size: D; None if no base model is at hand.
        out_features: output width of each corrected projection, by branch; None if no base model is at hand.
    """
    width, out = config.state_heads * config.rank, out_features or {}
    shapes: dict[str, Shape] = {f"{name}.weight": (width, hidden_size) for name in ("query", "key", "value")}
    for name in ("gate",) if config.couple_lambda else ("gate", "decay"):
        shapes |= {f"{name}.weight": (config.gate_width, hidden_size), f"{name}.bias": (config.gate_width,)}
    shapes |= {f"delta.{branch}.weight": (out.get(branch), width) for branch in config.branches}
    scales = {"fixed": 0, "layer": 1, "branch": len(BRANCHES)}[config.delta_scale]
    if scales:
        shapes["scale_raw"] = (scales,)
    if config.o_norm:
        shapes["o_norm.weight"] = (out.get("o"),)
    return shapes


def fingerprint_of(config: DeltaMemConfig, weights: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 over the mechanism and every weight of an adapter, by name."""
    # Options at their default stay out, so that a new option does not change the fingerprint of old adapters.
    defaults = DeltaMemConfig().to_dict()
    changed = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(np.ascontiguousarray(weight, dtype=np.float32).tobytes())
    return digest.hexdigest()
