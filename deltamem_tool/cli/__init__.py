"""The `deltamem` command: registers the subcommands, one file each, and prints errors in three lines."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import warnings
from typing import Any

import click
from click.exceptions import NoSuchCommand

from deltamem_tool._version import __version__
from deltamem_tool.cli.encoding import replace_unencodable
from deltamem_tool.cli.streams import open_missing
from deltamem_tool.cli.termination import interrupt_on_signals
from deltamem_tool.errors import DeltaMemError, OtherBaseWarning, domain_error
from deltamem_tool.io.cores import respect_quota

COMMANDS = {  # and what `deltamem --help` says of them
    "quickstart": "Train a memory for a small model, export it, and chat with it.",
    "architectures": "List the model types that support a memory.",
    "patch": "Create a new adapter for a base model.",
    "convert": "Convert an adapter from or to the reference implementation's format.",
    "inspect": "Describe an adapter, an ONNX folder or a memory file.",
    "train": "Train an adapter from a recipe.",
    "eval": "Measure what a memory is worth, compared with controls.",
    "compare": "Compare two evaluations.",
    "bench": "Measure what a memory costs, compared with a LoRA.",
    "export": "Export an adapter and its base model as an ONNX graph.",
    "run": "Answer prompts with an ONNX folder, without PyTorch.",
    "chat": "Chat with an adapter or an ONNX folder.",
    "serve": "Serve a model to many users, each with their own memory.",
    "page": "Build a web page with a chat that runs in the browser.",
    "push": "Publish an adapter on the Hub.",
    "pull": "Fetch an adapter from the Hub and check it.",
}
_FORMAT_WARNING = warnings.formatwarning  # Python's own
_MODULES = {"eval": "evaluate"}  # files not named as their command
# The extras that each command needs; the others need none.
_EXTRAS: dict[str, tuple[str, ...]] = {
    "bench": ("train", "eval", "export", "cpu"),
    "convert": ("torch",),
    "eval": ("eval",),
    "export": ("export", "cpu"),
    "page": ("cpu",),
    "patch": ("torch",),
    "quickstart": ("train", "eval", "export", "cpu"),
    "run": ("cpu",),
    "serve": ("serve",),
    "train": ("train",),
}


class _Commands(click.Group):
    """A group that imports a command only when it is needed, so that `deltamem --help` imports none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return _command(name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except NoSuchCommand as error:  # click knows only commands that are imported
            raise NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx) from None


@functools.cache
def _command(name: str) -> click.Command:
    """Return the command, which checks the installation before it runs; `--help` does not."""
    command: click.Command = importlib.import_module(f"deltamem_tool.cli.{_MODULES.get(name, name)}").command
    run = command.callback
    assert run is not None

    @functools.wraps(run)
    def checked(*args: Any, **kwargs: Any) -> Any:
        from deltamem_tool.io.installation import check_installation

        check_installation(*_EXTRAS.get(name, ()))
        return run(*args, **kwargs)

    command.callback = checked
    return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="deltamem")
def cli() -> None:
    """Give a frozen language model an online associative memory (δ-mem)."""


def main(command: click.Command = cli) -> None:
    """Run a command, by default `deltamem`, and exit.

    Domain errors print what failed, why, and what to do next, and exit with 1; bad usage exits with 2; a signal exits
    with 128 plus its number; anything unexpected keeps its traceback.
    """
    open_missing()
    replace_unencodable()
    # These must be set before torch and the Hub's client are imported. Waiting threads that spin make other work on
    # the same cores many times slower; progress bars are for terminals.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    respect_quota()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.formatwarning = _format_warning
    # On some processors its import warns of a missing package that nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with interrupt_on_signals():
            command(prog_name="deltamem" if command is cli else None)
    except Exception as error:
        user_error = domain_error(error)
        if user_error is None:
            raise
        _fail(user_error)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Show the text alone for our own warnings, and the place in the code too for others."""
    if issubclass(category, OtherBaseWarning):
        return f"Warning: {message}\n"
    return _FORMAT_WARNING(message, category, filename, lineno, line)


def _fail(error: DeltaMemError) -> None:
    from rich.text import Text

    from deltamem_tool.cli.console import STDERR

    STDERR.print(Text(f"Error: {error.what}", style="red"), soft_wrap=True)
    for line in (error.why, error.next):
        if line:
            STDERR.print(Text(line), soft_wrap=True)
    sys.exit(1)
