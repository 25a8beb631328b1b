"""The weights of a layer's memory by name and shape, without making one."""

from __future__ import annotations

from collections.abc import Mapping

from deltamem_tool.config import BRANCHES, DeltaMemConfig

Shape = tuple[int | None, ...]  # None: a size that only the base model knows


def weight_shapes(
    config: DeltaMemConfig, hidden_size: int | None = None, out_features: Mapping[str, int] | None = None
) -> dict[str, Shape]:
    """The shapes of a `DeltaMemory`'s weights, in the order of its state dict.

    Args:
        config: the mechanism.
        hidden_size: D; None where no base model is at hand.
        out_features: output width of each corrected projection, by branch; likewise.
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
