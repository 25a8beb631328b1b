"""The mechanism's options: everything that says what an adapter computes, nothing about how it is trained or run."""

from __future__ import annotations

import difflib
import functools
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from deltamem_tool.errors import ConfigError

BRANCHES = ("q", "k", "v", "o")
UPDATE_RULES = ("standard", "lambda_outside", "no_lambda")
GRANULARITIES = ("token", "message", "sentence")
GATES = ("row", "head")
DELTA_INITS = ("zero", "random", "base_slice")
DELTA_SCALES = ("fixed", "layer", "branch")
MAX_RANK = 64
L2_EPS = 1e-6  # the least length that queries and keys are divided by
MAX_STATE_HEADS = 256  # the paper has 4
MAX_LAYERS = 10_000  # the deepest models have 126
_PARTS = re.compile(r"(front|middle|back):([1-9][0-9]{0,3})")

# Options that files have under another name, which they have had since the first format.
NAMES_IN_FILES = {"branches": "heads"}

# The paper's three ways to write, with the initial Δ of its runs; everything else is the default.
PRESETS: dict[str, dict[str, Any]] = {
    "tsw": {"granularity": "token", "state_heads": 1, "delta_init": "base_slice"},
    "ssw": {"granularity": "message", "state_heads": 1, "delta_init": "base_slice"},
    "msw": {"granularity": "token", "state_heads": 4, "delta_init": "base_slice"},
}


@dataclass(frozen=True)
class DeltaMemConfig:
    """Options of δ-mem (arXiv 2605.12357). The defaults are the paper's token-state write on q and o.

    Args:
        rank: R, rows and columns of a state.
        state_heads: H, states side by side in every layer; 1 is the paper's TSW, 4 its MSW.
        branches: which projections of attention the reading corrects, out of q, k, v, o. Files have it as "heads".
        alpha: corrections are scaled by alpha / rank.
        layers: indices of the decoder layers that get a memory; or "all" attention layers; or so many of them at the
            "front:12", in the "middle:12", at the "back:12".
        granularity: what is written at once. Every "token" (TSW, MSW), or the mean of a segment when it ends: a chat
            "message" (SSW), or a "sentence".
        update_rule: how the gates λ and β keep, erase and write; see `memory.layer.gates`.
        couple_lambda: λ = 1 − β; or else λ has a projection of its own.
        gates: one gate per "row" of a state, or one per "head".
        beta_bias: initial bias of the write gate's pre-activation, sigmoid(-1.5) = 0.18; an own λ starts at
            its negative.
        delta_init: a fresh Δ is "zero" (outputs are exactly the base's), "random", or starts from normalised columns of
            the branch's own base weight ("base_slice", the paper's training runs).
        delta_scale: corrections have no further scale ("fixed"), or a learned one per "layer" or "branch":
            sigmoid(raw) · delta_scale_max, at first delta_scale_init.
        o_norm: RMSNorm, with a weight and o_norm_eps, on the correction of the o branch. It undoes alpha and learned
            scales there.

    Raises:
        ConfigError: an option is out of range.
    """

    rank: int = 8
    state_heads: int = 1
    branches: tuple[str, ...] = ("q", "o")
    alpha: float = 16.0
    layers: str | tuple[int, ...] = "all"
    granularity: str = "token"
    update_rule: str = "standard"
    couple_lambda: bool = True
    gates: str = "row"
    beta_bias: float = -1.5
    delta_init: str = "zero"
    delta_scale: str = "fixed"
    delta_scale_init: float = 1.0
    delta_scale_max: float = 2.0
    o_norm: bool = False
    o_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("branches", "layers"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        _require(_is_int(self.rank) and 1 <= self.rank <= MAX_RANK, f"rank must be 1 to {MAX_RANK}, not {self.rank!r}")
        _require(
            _is_int(self.state_heads) and 1 <= self.state_heads <= MAX_STATE_HEADS,
            f"state_heads must be 1 to {MAX_STATE_HEADS}, not {self.state_heads!r}",
        )
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r}")
        for name in ("couple_lambda", "o_norm"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name} must be true or false, not {value!r}")
        for name in ("alpha", "delta_scale_init", "delta_scale_max", "o_norm_eps"):
            value = getattr(self, name)
            _require(_is_number(value) and value > 0, f"{name} must be a positive number, not {value!r}")
        _require(_is_number(self.beta_bias), f"beta_bias must be a number, not {self.beta_bias!r}")
        self._check_branches()
        self._check_layers()
        _require(
            self.couple_lambda or self.update_rule != "no_lambda",
            "update_rule no_lambda has no λ, so that couple_lambda must be true",
        )
        _require(
            self.delta_scale_init < self.delta_scale_max,
            f"delta_scale_init, {self.delta_scale_init}, must be less than delta_scale_max, {self.delta_scale_max}",
        )
        _require(not self.o_norm or "o" in self.branches, "o_norm has nothing to act on: branches has no o")

    def _check_branches(self) -> None:
        _require(isinstance(self.branches, tuple), f"branches must be a list out of q, k, v, o, not {self.branches!r}")
        _require(len(self.branches) > 0, "branches names no projection: give at least one of q, k, v, o")
        for branch in self.branches:
            _require(branch in BRANCHES, f"branches has {branch!r}: the projections are q, k, v, o")
            _require(self.branches.count(branch) == 1, f"branches names {branch!r} twice")

    def _check_layers(self) -> None:
        forms = "'all', 'front:N', 'middle:N', 'back:N' or a list of indices"
        if isinstance(self.layers, str):
            known = self.layers == "all" or _PARTS.fullmatch(self.layers) is not None
            _require(known, f"layers must be {forms}, not {self.layers!r}")
        else:
            _require(isinstance(self.layers, tuple), f"layers must be {forms}, not {self.layers!r}")
            _require(len(self.layers) > 0, "layers is an empty list")
            _require(
                all(_is_int(i) and 0 <= i < MAX_LAYERS for i in self.layers),
                f"layers must be indices from 0, not {self.layers!r}",
            )
            _require(len(set(self.layers)) == len(self.layers), f"layers names an index twice: {self.layers!r}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DeltaMemConfig:
        """The paper's settings of "tsw", "ssw" or "msw", with `changes`.

        Raises:
            ConfigError: there is no such preset, or a change does not hold.
        """
        if name not in PRESETS:
            raise ConfigError(f"There is no preset {name!r}.", "", f"The presets are: {', '.join(PRESETS)}.")
        return cls.from_dict({**PRESETS[name], **changes})

    @property
    def layer_part(self) -> tuple[str, int] | None:
        """("front" | "middle" | "back", how many) where `layers` names a part; None where it does not."""
        match = _PARTS.fullmatch(self.layers) if isinstance(self.layers, str) else None
        return (match[1], int(match[2])) if match else None

    @property
    def scale(self) -> float:
        """α/R, the factor on every correction."""
        return self.alpha / self.rank

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, R, R) of one layer's state, which is float32."""
        return self.state_heads, self.rank, self.rank

    @property
    def gate_width(self) -> int:
        """How many gates of one kind a token has."""
        return self.state_heads * (self.rank if self.gates == "row" else 1)

    @property
    def segment_width(self) -> int:
        """Numbers that one layer keeps of an open segment: sums of the pre-activations of key, value and gates, and
        the count of its tokens. 0 where every token writes."""
        if self.granularity == "token":
            return 0
        return 2 * self.state_heads * self.rank + (1 if self.couple_lambda else 2) * self.gate_width + 1

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary with the names that files have, the inverse of `from_dict`."""
        return {
            NAMES_IN_FILES.get(name, name): list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> DeltaMemConfig:
        """The options of a file, or of keyword arguments.

        Raises:
            ConfigError: an option is unknown, given under two names, or out of range.
        """
        known = [field.name for field in fields(cls)]
        for name, in_files in NAMES_IN_FILES.items():
            if in_files in options:
                _require(name not in options, f"{name} and {in_files} are two names of one option")
                options = {name if key == in_files else key: value for key, value in options.items()}
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ConfigError(
                    f"The memory option {name!r} is not known.",
                    f"Did you mean {near[0]!r}?" if near else "",
                    f"The options are: {', '.join(known)}.",
                )
        return cls(**options)


_init = DeltaMemConfig.__init__


@functools.wraps(_init)
def _init_with_older_names(self: DeltaMemConfig, *args: Any, **kwargs: Any) -> None:
    """Options are still taken by the names that files have for them."""
    for name, in_files in NAMES_IN_FILES.items():
        if in_files in kwargs:
            warnings.warn(f"The option {in_files} is called {name} now.", FutureWarning, stacklevel=2)
            _require(name not in kwargs, f"{name} and {in_files} are two names of one option")
            kwargs[name] = kwargs.pop(in_files)
    _init(self, *args, **kwargs)


DeltaMemConfig.__init__ = _init_with_older_names  # type: ignore[method-assign]

_CHOICES = {
    "granularity": GRANULARITIES,
    "update_rule": UPDATE_RULES,
    "gates": GATES,
    "delta_init": DELTA_INITS,
    "delta_scale": DELTA_SCALES,
}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max  # no NaN, no infinity, no giant integer


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ConfigError("The memory's options do not hold.", f"{why}.", "Correct the option and try again.")
