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
    """A path whose leading `~` means the home folder; after `--out=`, a shell does not expand it."""

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
    """Text for a model, without the byte-order mark that a file may begin with."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not is_unicode(value):
            self.fail(f"{value!a} is not Unicode text: its bytes are not UTF-8", param, ctx)
        return value.removeprefix(BYTE_ORDER_MARK)


TEXT = _Text()

trust_remote_code = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Allow the base model to run its own Python files, where these define its architecture.",
)
allow_other_base = click.option(
    "--allow-other-base",
    is_flag=True,
    help="Allow a base model other than the one the adapter was made for, such as the original of a GGUF file.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
window = click.option(
    "--window",
    type=click.IntRange(min=2),
    help="Maximum number of tokens in the context. When it is full, the oldest turns leave it; the memory keeps a "
    "trace of them.  [default: the model's maximum length, or the --max-length of an export]",
)

SEED = click.IntRange(0, 2**32 - 1)  # as in a recipe
MARGIN = click.FloatRange(min=0, min_open=True)

_DEFAULT_DEVICE = "[default: cuda if available, else cpu]"
single_device = click.option("--device", help=f"Device for the models, such as cuda:1.  {_DEFAULT_DEVICE}")
device = click.option(
    "--device",
    help="Device for the model, such as cuda:1. `auto` spreads an adapter's base model over GPUs, CPU and disk; `tp` "
    f"shards it over the processes of a torchrun launch (tensor parallelism).  {_DEFAULT_DEVICE}",
)

_SAMPLING = (
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=MAX_NEW_TOKENS,
        show_default=True,
        help="Maximum length of an answer, in tokens.",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="Sampling temperature; 0 picks the most likely token.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Sample among the k most likely tokens; 0 means all.",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(min=0, max=1, min_open=True),
        default=1.0,
        show_default=True,
        help="Sample among the most likely tokens whose probabilities add up to this.",
    ),
    click.option(
        "--min-p",
        type=click.FloatRange(min=0, max=1),
        default=0.0,
        show_default=True,
        help="Sample among tokens with at least this fraction of the most likely token's probability.",
    ),
    click.option(
        "--repetition-penalty",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        show_default=True,
        help="Above 1, tokens already in the context become less likely.",
    ),
    click.option("--seed", type=click.IntRange(min=0), help="Random seed for sampling.  [default: a new one]"),
    click.option("--stop", type=TEXT, multiple=True, help="Stop string: the answer ends before it; repeatable."),
)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each field of `Sampling` to a command."""
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
