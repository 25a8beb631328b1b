"""The corrections that readings add to a layer's attention: Δ of every branch, learned scales, and a norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamem_tool.config import BRANCHES, L2_EPS, DeltaMemConfig
from deltamem_tool.ops.scan import full_precision

INIT_GAIN = 0.05  # the length of a column of a "base_slice" Δ, and the factor on a "random" one
BASE_SLICE_WIDTH = 8  # how many columns of Δ "base_slice" fills at most


class Corrections(nn.Module):
    """Corrections of one layer's branches, in float32, whatever dtype its weights have been cast to.

    Args:
        config: the mechanism.
    """

    def __init__(self, config: DeltaMemConfig) -> None:
        super().__init__()
        self.config = config

    def add_corrections(self, out_features: Mapping[str, int]) -> None:
        """Add the weights. Their order among a subclass's own weights is that of its state dict.

        Args:
            out_features: output width of each corrected projection, by branch.
        """
        config, width = self.config, self.config.state_heads * self.config.rank
        self.delta = nn.ModuleDict(
            {
                branch: nn.Linear(width, out_features[branch], bias=False, dtype=torch.float32)
                for branch in config.branches
            }
        )
        # One raw scale, or one a branch in the order of BRANCHES; those of branches that are off stay unused.
        scales = {"fixed": 0, "layer": 1, "branch": len(BRANCHES)}[config.delta_scale]
        self.scale_raw = nn.Parameter(torch.empty(scales, dtype=torch.float32)) if scales else None
        self.o_norm = nn.RMSNorm(out_features["o"], config.o_norm_eps, dtype=torch.float32) if config.o_norm else None

    def reset_corrections(self) -> None:
        """Initialise the weights as the paper does."""
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

    def delta_of(self, branch: str) -> nn.Linear:
        """Return Δ of one branch, `[out, H·R]`."""
        return cast(nn.Linear, self.delta[branch])

    @torch.no_grad()
    def start_from_base(self, columns: Mapping[str, Tensor]) -> None:
        """Fill the first columns of each Δ with those of its branch's base weight, normalised to a fixed length.

        The columns are `[out, n]` by branch. The reference implementation calls this `base_slice_fixed`.
        """
        for branch, weight in columns.items():
            delta = self.delta_of(branch).weight
            count = min(BASE_SLICE_WIDTH, self.config.rank, weight.shape[1])
            delta[:, :count] = F.normalize(weight[:, :count].to(delta), dim=0, eps=L2_EPS) * INIT_GAIN

    def scale_readings(self, readings: Tensor) -> Tensor:
        """Return (α/R) · r, times the layer's learned scale if there is one.

        The readings r are scaled instead of Δ r, which is much longer and computed for every branch.
        """
        scale = self.config.scale
        return readings * (self._learned_scale(0) * scale if self.config.delta_scale == "layer" else scale)

    def correction(self, branch: str, scaled: Tensor) -> Tensor:
        """Return the correction of one branch from `scaled` readings `[B, T, H·R]`, float32 `[B, T, out]`.

        It is Δ r, times the branch's learned scale if there is one, and normalised if o_norm is on and the branch is o.
        """
        with full_precision(scaled.device):
            steer = F.linear(self._for_branch(branch, scaled), self.delta_of(branch).weight.float())
            if branch != "o" or self.o_norm is None:
                return steer
            return F.rms_norm(steer, self.o_norm.normalized_shape, self.o_norm.weight.float(), self.o_norm.eps)

    def correct(self, branch: str, scaled: Tensor, output: Tensor) -> Tensor:
        """Add the correction to the `output` `[B, T, out]` of a branch's projection, in one pass if possible."""
        apart = output.dtype != scaled.dtype or output.device != scaled.device
        if apart or (branch == "o" and self.config.o_norm):
            return output + self.correction(branch, scaled).to(output)
        with full_precision(scaled.device):
            readings = self._for_branch(branch, scaled)
            delta = self.delta_of(branch).weight.float()
            # In a graph too: with two axes, ONNX Runtime's fusion of the norms that follow goes wrong.
            if torch.compiler.is_exporting() or readings.shape[1] == 1:
                return output + F.linear(readings, delta)
            return torch.addmm(output.flatten(0, 1), readings.flatten(0, 1), delta.mT).view(output.shape)

    def _for_branch(self, branch: str, scaled: Tensor) -> Tensor:
        return scaled * self._learned_scale(BRANCHES.index(branch)) if self.config.delta_scale == "branch" else scaled

    def _learned_scale(self, which: int) -> Tensor:
        assert self.scale_raw is not None
        return torch.sigmoid(self.scale_raw[which].float()) * self.config.delta_scale_max
