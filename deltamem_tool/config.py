"""The mechanism's options: everything that says what an adapter computes, nothing about how it is trained or run."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from deltamem_tool.errors import ConfigError

BRANCHES = ("q", "k", "v", "o")
UPDATE_RULES = ("standard", "lambda_outside", "no_lambda")
DELTA_INITS = ("zero", "base_slice")
MAX_RANK = 64


@dataclass(frozen=True)
class DeltaMemConfig:
    """Options of δ-mem (arXiv 2605.12357). The defaults are the paper's token-state write on q and o.

    Args:
        rank: R, rows and columns of a state.
        state_heads: H, states side by side in every layer; 1 is the paper's TSW, 4 its MSW.
        heads: which projections of attention the reading corrects, out of q, k, v, o.
        alpha: corrections are scaled by alpha / rank.
        layers: indices of the decoder layers that get a memory, or "all" attention layers.
        update_rule: how the gates λ and β keep, erase and write; see `DeltaMemory.gates`.
        beta_bias: initial bias of the write gate's pre-activation, sigmoid(-1.5) = 0.18.
        delta_init: a fresh Δ is "zero" (outputs are exactly the base's), or starts from normalised columns of the
            branch's own base weight ("base_slice", the paper's training runs).

    Raises:
        ConfigError: an option is out of range.
    """

    rank: int = 8
    state_heads: int = 1
    heads: tuple[str, ...] = ("q", "o")
    alpha: float = 16.0
    layers: str | tuple[int, ...] = "all"
    update_rule: str = "standard"
    beta_bias: float = -1.5
    delta_init: str = "zero"

    def __post_init__(self) -> None:
        for name in ("heads", "layers"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        _require(isinstance(self.heads, tuple), f"heads must be a list out of q, k, v, o, not {self.heads!r}")
        _require(_is_int(self.rank) and 1 <= self.rank <= MAX_RANK, f"rank must be 1 to {MAX_RANK}, not {self.rank!r}")
        _require(
            _is_int(self.state_heads) and self.state_heads >= 1,
            f"state_heads must be 1 or more, not {self.state_heads!r}",
        )
        _require(len(self.heads) > 0, "heads names no projection: give at least one of q, k, v, o")
        for head in self.heads:
            _require(head in BRANCHES, f"heads has {head!r}: the projections are q, k, v, o")
            _require(self.heads.count(head) == 1, f"heads names {head!r} twice")
        _require(_is_number(self.alpha) and self.alpha > 0, f"alpha must be a positive number, not {self.alpha!r}")
        _require(_is_number(self.beta_bias), f"beta_bias must be a number, not {self.beta_bias!r}")
        if isinstance(self.layers, str):
            _require(self.layers == "all", f"layers must be 'all' or a list of indices, not {self.layers!r}")
        else:
            _require(isinstance(self.layers, tuple), f"layers must be 'all' or a list of indices, not {self.layers!r}")
            _require(len(self.layers) > 0, "layers is an empty list")
            _require(
                all(_is_int(i) and i >= 0 for i in self.layers), f"layers must be indices from 0, not {self.layers!r}"
            )
            _require(len(set(self.layers)) == len(self.layers), f"layers names an index twice: {self.layers!r}")
        _require(
            self.update_rule in UPDATE_RULES,
            f"update_rule must be one of {', '.join(UPDATE_RULES)}, not {self.update_rule!r}",
        )
        _require(
            self.delta_init in DELTA_INITS,
            f"delta_init must be one of {', '.join(DELTA_INITS)}, not {self.delta_init!r}",
        )

    @property
    def scale(self) -> float:
        """α/R, the factor on every correction."""
        return self.alpha / self.rank

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, R, R) of one layer's state, which is float32."""
        return self.state_heads, self.rank, self.rank

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, the inverse of `from_dict`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> DeltaMemConfig:
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ConfigError(
                    f"The memory option {name!r} is not known.",
                    f"Did you mean {near[0]!r}?" if near else "",
                    f"The options are: {', '.join(known)}.",
                )
        return cls(**options)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ConfigError("The memory's options do not hold.", f"{why}.", "Correct the option and try again.")
