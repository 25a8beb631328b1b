"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from deltamem_tool.chat.sampling import MAX_NEW_TOKENS
from deltamem_tool.io.names import expand_name
from deltamem_tool.segments.messages import BYTE_ORDER_MARK, is_unicode

if TYPE_CHECKING:
    import torch


class UserPath(click.Path):
    """A path, a leading `~` of which is the home folder: after `--out=`, a shell leaves it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path as `click.Path` does."""
        return super().convert(expand_name(value), param, ctx)


class _Name(click.ParamType[str]):
    """A path, or a name on the Hub."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return expand_name(value)


NAME = _Name()


class _Text(click.ParamType[str]):
    """What a model is told; without the byte-order mark of a file that it may come from."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not is_unicode(value):
            self.fail(f"{value!a} is not Unicode text: its bytes are not UTF-8", param, ctx)
        return value.removeprefix(BYTE_ORDER_MARK)


TEXT = _Text()

trust_remote_code = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python files of the base model, where its architecture is one."
)
allow_other_base = click.option(
    "--allow-other-base",
    is_flag=True,
    help="Run the adapter on another base model than it was made for, such as the original of a GGUF file.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
window = click.option(
    "--window",
    type=click.IntRange(min=2),
    help="The most tokens of context. The oldest turns leave it; the memory keeps their trace.  [default: as many as "
    "the model has positions, or the --max-length of an export]",
)

SEED = click.IntRange(0, 2**32 - 1)  # as in a recipe
MARGIN = click.FloatRange(min=0, min_open=True)

device = click.option(
    "--device",
    help="Where the model runs, such as cuda:1; `auto` spreads an adapter's base over GPUs, CPU and disk, and with "
    "`tp` the processes of a launch (torchrun) share its weights.  [default: cuda if there is one, or else cpu]",
)

_SAMPLING = (
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=MAX_NEW_TOKENS,
        show_default=True,
        help="The longest answer.",
    ),
    click.option(
        "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest token."
    ),
    click.option(
        "--top-k",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Sample among so many likeliest tokens; 0: all.",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(min=0, max=1, min_open=True),
        default=1.0,
        show_default=True,
        help="Sample among the likeliest tokens that hold this much probability.",
    ),
    click.option(
        "--min-p",
        type=click.FloatRange(min=0, max=1),
        default=0.0,
        show_default=True,
        help="Sample among tokens with at least this share of the likeliest one's probability.",
    ),
    click.option(
        "--repetition-penalty",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        show_default=True,
        help="Above 1: tokens of the context become less likely.",
    ),
    click.option("--seed", type=click.IntRange(min=0), help="Of the sampling.  [default: a new one]"),
    click.option(
        "--stop", type=TEXT, multiple=True, help="A text that ends the answer, which ends before it; can be repeated."
    ),
)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each field of `Sampling`."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def whole_numbers(ctx: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """Parse a list such as 1,2,4, as an option's `callback`."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list such as 1,2,4") from None
    if len(set(numbers)) < len(numbers):
        raise click.BadParameter(f"{text!r} has a number twice")
    return numbers


def torch_device(name: str | None) -> torch.device:
    """Return the device that `--device` names, or the default."""
    import torch

    available = torch.cuda.is_available()
    try:
        where = torch.device(name or ("cuda" if available else "cpu"))
    except RuntimeError:
        raise click.BadParameter(f"{name!r} is not a device", param_hint="--device") from None
    if where.type == "cuda" and (not available or (where.index or 0) >= torch.cuda.device_count()):
        raise click.BadParameter(f"this machine has no {name}", param_hint="--device")
    return where
