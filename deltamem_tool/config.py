"""The options of the mechanism: everything that defines what an adapter computes, but not how it is trained or run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    StrictBool,
    ValidationError,
    WrapValidator,
)
from pydantic.dataclasses import dataclass

from deltamem_tool.errors import ConfigError, config_error, problems_of

Granularity = Literal["token", "message", "sentence"]
UpdateRule = Literal["standard", "lambda_outside", "no_lambda"]
Gates = Literal["row", "head"]
DeltaInit = Literal["zero", "random", "base_slice"]
DeltaScale = Literal["fixed", "layer", "branch"]

BRANCHES = ("q", "k", "v", "o")
UPDATE_RULES: tuple[str, ...] = get_args(UpdateRule)
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
GATES: tuple[str, ...] = get_args(Gates)
DELTA_INITS: tuple[str, ...] = get_args(DeltaInit)
DELTA_SCALES: tuple[str, ...] = get_args(DeltaScale)
MAX_RANK = 64
L2_EPS = 1e-6  # lower bound of the norm that queries and keys are divided by
MAX_STATE_HEADS = 256  # the paper has 4
MAX_SEED = 2**32 - 1  # the largest seed that numpy and torch accept
MAX_NUMBER = 1e30  # upper bound of options, far below the overflow of float32
MAX_LAYERS = 10_000  # the deepest models have 126
_PARTS = re.compile(r"(front|middle|back):([1-9][0-9]{0,3})")
OPTIONS = ConfigDict(extra="forbid", allow_inf_nan=False)  # of every class of options

# The paper's three ways to write, with the initial Δ of its runs; everything else is the default.
PRESETS: dict[str, dict[str, Any]] = {
    "tsw": {"granularity": "token", "state_heads": 1, "delta_init": "base_slice"},
    "ssw": {"granularity": "message", "state_heads": 1, "delta_init": "base_slice"},
    "msw": {"granularity": "token", "state_heads": 4, "delta_init": "base_slice"},
}


class Rule(NamedTuple):
    """A rule about a combination of options."""

    keys: tuple[str, ...]
    holds: Callable[..., bool]  # whether the values of the keys satisfy the rule
    why: str  # message if they do not, with {} for each of the keys


class CheckedOptions(type):
    """Metaclass of frozen pydantic dataclasses whose ConfigError names every invalid option."""

    INVALID: str  # first line of that error
    SECTION: tuple[str, ...] = ()  # prefix of the options' names in messages
    OLDER_NAMES: Mapping[str, str] = {}  # former names of options that are still accepted
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Create the options; raise a ConfigError if some are invalid, and warn about older names."""
        for older in cls.OLDER_NAMES.keys() & kwargs.keys():
            warnings.warn(f"The option {older} is now called {cls.OLDER_NAMES[older]}.", FutureWarning, stacklevel=2)
        try:
            options = super().__call__(*args, **cls.current_names(kwargs))
        except ValidationError as error:
            known = {cls.SECTION: [field.name for field in fields(cls)]}
            raise config_error(cls.INVALID, [why for _, why in problems_of(error, known, cls.SECTION)]) from None
        if broken := options._broken_rules():
            raise config_error(cls.INVALID, broken)
        return options

    def current_names(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return `options` with their current names.

        Raises:
            ConfigError: an option is given under two names.
        """
        for older, name in cls.OLDER_NAMES.items():
            if older in options and name in options:
                raise config_error(cls.INVALID, [f"{older} is the old name of {name}: leave out one of them"])
        return {cls.OLDER_NAMES.get(key, key): value for key, value in options.items()}


def _as_given(value: Any, check: Callable[[Any], Any]) -> Any:
    """Keep 8 as 8, not 8.0, since fingerprints are computed from the values in the file."""
    check(value)
    return value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_branches(branches: tuple[str, ...]) -> tuple[str, ...]:
    if not branches:
        raise ValueError("must not be empty: give at least one of q, k, v, o")
    for branch in branches:
        if branch not in BRANCHES:
            raise ValueError(f"has {branch!r}: the projections are q, k, v, o")
        if branches.count(branch) > 1:
            raise ValueError(f"names {branch!r} twice")
    return branches


def _check_layers(layers: Any) -> Any:
    if isinstance(layers, str) and (layers == "all" or _PARTS.fullmatch(layers)):
        return layers
    layers = _as_tuple(layers)
    if not isinstance(layers, tuple):
        raise ValueError(f"must be 'all', 'front:N', 'middle:N', 'back:N' or a list of indices, not {layers!r}")
    if not layers:
        raise ValueError("must not be an empty list")
    if not all(type(index) is int and 0 <= index < MAX_LAYERS for index in layers):
        raise ValueError(f"must be indices from 0, not {layers!r}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"names an index twice: {layers!r}")
    return layers


Number = Annotated[float, Strict(), Field(ge=-MAX_NUMBER, le=MAX_NUMBER), WrapValidator(_as_given)]
Positive = Annotated[float, Strict(), Field(gt=0, le=MAX_NUMBER), WrapValidator(_as_given)]
Branches = Annotated[
    tuple[Annotated[str, Strict()], ...], Strict(), BeforeValidator(_as_tuple), AfterValidator(_check_branches)
]
Layers = Annotated[str | tuple[int, ...], PlainValidator(_check_layers)]


@dataclass(frozen=True, config=OPTIONS)
class DeltaMemConfig(metaclass=CheckedOptions):
    """Options of δ-mem (arXiv 2605.12357). The defaults are the paper's token-state write on q and o.

    Args:
        rank: R; a state has R rows and R columns.
        state_heads: H, the number of states per layer; 1 is the paper's TSW, 4 its MSW.
        branches: attention projections that the reading corrects, out of q, k, v, o. Called "heads" in files.
        alpha: corrections are scaled by alpha / rank.
        layers: decoder layers that get a memory: a list of indices, "all" attention layers, or a number of them at the
            front, in the middle or at the back, such as "front:12", "middle:12" or "back:12".
        granularity: unit that is written at once. With "token" (TSW, MSW) every token writes. With "message" (SSW) or
            "sentence", the mean of a chat message or of a sentence is written when it ends.
        update_rule: how the gates λ and β keep, erase and write; see `ops.gates.gates`.
        couple_lambda: use λ = 1 − β. If False, λ has a projection of its own.
        gates: one gate per "row" of a state, or one per "head".
        beta_bias: initial bias of the write gate's pre-activation; sigmoid(-1.5) = 0.18. If λ has a projection of its
            own, its bias starts at the negative of this value.
        delta_init: initial value of Δ: "zero" (outputs are exactly those of the base model), "random", or "base_slice",
            normalised columns of the base weight of the same branch, as in the paper's training runs.
        delta_scale: scale of the corrections besides alpha / rank: none ("fixed"), or a learned one per "layer" or
            "branch", which is sigmoid(raw) · delta_scale_max.
        delta_scale_init: initial value of a learned scale.
        delta_scale_max: upper bound of a learned scale.
        o_norm: apply RMSNorm, with a learned weight, to the correction of the o branch. It cancels alpha and learned
            scales there.
        o_norm_eps: epsilon of that RMSNorm.

    Raises:
        ConfigError: an option is out of range.

    Example:
        >>> import deltamem_tool as deltamem
        >>> config = deltamem.DeltaMemConfig(state_heads=4, branches=["q", "o"], layers="middle:12")
        >>> config.rank, config.state_shape
        (8, (4, 8, 8))
    """

    rank: Annotated[int, Strict(), Field(ge=1, le=MAX_RANK)] = 8
    state_heads: Annotated[int, Strict(), Field(ge=1, le=MAX_STATE_HEADS)] = 1
    branches: Branches = ("q", "o")
    alpha: Positive = 16.0
    layers: Layers = "all"
    granularity: Granularity = "token"
    update_rule: UpdateRule = "standard"
    couple_lambda: StrictBool = True
    gates: Gates = "row"
    beta_bias: Number = -1.5
    delta_init: DeltaInit = "zero"
    delta_scale: DeltaScale = "fixed"
    delta_scale_init: Positive = 1.0
    delta_scale_max: Positive = 2.0
    o_norm: StrictBool = False
    o_norm_eps: Positive = 1e-6

    INVALID: ClassVar[str] = "The memory options are invalid."
    OLDER_NAMES: ClassVar[Mapping[str, str]] = {"heads": "branches"}  # the name that files have
    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            ("update_rule", "couple_lambda"),
            lambda rule, coupled: coupled or rule != "no_lambda",
            "{} no_lambda has no λ: {} must be true",
        ),
        Rule(
            ("delta_scale_init", "delta_scale_max"),
            lambda initial, most: initial < most,
            "{} must be less than {}",
        ),
        Rule(
            ("o_norm", "branches"),
            lambda norm, branches: not norm or "o" in branches,
            "{} normalises the correction of o, which is not in {}",
        ),
    )

    def _broken_rules(self) -> list[str]:
        return broken_rules(self)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DeltaMemConfig:
        """Return the paper's settings of "tsw", "ssw" or "msw", overridden by `changes`.

        Raises:
            ConfigError: there is no such preset, or a changed option is invalid.
        """
        if name not in PRESETS:
            raise ConfigError(f"There is no preset {name!r}.", "", f"The presets are: {', '.join(PRESETS)}.")
        return cls.from_dict({**PRESETS[name], **changes})

    @property
    def layer_part(self) -> tuple[str, int] | None:
        """("front" | "middle" | "back", number of layers) if `layers` names a part; None otherwise."""
        match = _PARTS.fullmatch(self.layers) if isinstance(self.layers, str) else None
        return (match[1], int(match[2])) if match else None

    @property
    def scale(self) -> float:
        """α/R, the factor of every correction."""
        return self.alpha / self.rank

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, R, R), the shape of one layer's state, which is float32."""
        return self.state_heads, self.rank, self.rank

    @property
    def gate_width(self) -> int:
        """Number of gates of one kind per token."""
        return self.state_heads * (self.rank if self.gates == "row" else 1)

    @property
    def segment_width(self) -> int:
        """Number of values that one layer keeps of an open segment; 0 if every token writes.

        They are the sums of the pre-activations of key, value and gates, and the number of tokens.
        """
        if self.granularity == "token":
            return 0
        return 2 * self.state_heads * self.rank + (1 if self.couple_lambda else 2) * self.gate_width + 1

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary with the names used in files; the inverse of `from_dict`."""
        in_files = {name: older for older, name in self.OLDER_NAMES.items()}
        return {
            in_files.get(name, name): list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> DeltaMemConfig:
        """Make a config from the options in a file, or from keyword arguments.

        Raises:
            ConfigError: an option is unknown, given under two names, or out of range.
        """
        return cls(**cls.current_names(options))


def broken_rules(config: DeltaMemConfig, names: Mapping[str, str] | None = None) -> list[str]:
    """Return messages about combinations of valid options that violate a rule, with the options' names in `names`."""
    return [
        rule.why.format(*((names or {}).get(key, key) for key in rule.keys))
        for rule in config.RULES
        if not rule.holds(*(getattr(config, key) for key in rule.keys))
    ]


def check_seed(seed: int) -> None:
    """Check that numpy and torch accept `seed`. Call this before long work begins.

    Raises:
        ConfigError: the seed is negative or too large.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"The seed is {seed}.", "", f"Choose a number from 0 to {MAX_SEED}.")
