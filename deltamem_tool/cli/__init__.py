"""The command `deltamem`: one file a command; here they are registered, and errors become three lines."""

from __future__ import annotations

import errno
import importlib
import os
import sys

import click

from deltamem_tool import __version__
from deltamem_tool.errors import DeltaMemError

COMMANDS = ("quickstart", "architectures", "patch", "convert", "inspect", "train", "eval", "export", "run")
_MODULES = {"eval": "evaluate"}  # files whose name is not the command's


class _Commands(click.Group):
    """Commands are imported when asked for, so that `deltamem --help` does not wait for any."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"deltamem_tool.cli.{_MODULES.get(name, name)}").command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="deltamem")
def cli() -> None:
    """Give a frozen language model an online associative memory (δ-mem)."""


def main() -> None:
    """Run a command. Domain errors print what failed, why, and what to do next, and exit with 1; bad usage exits with
    2; anything unexpected keeps its traceback."""
    # Waiting threads that spin make other work on the same cores many times slower. Must stand before torch comes.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        cli(prog_name="deltamem")
    except DeltaMemError as error:
        _fail(error)
    except Exception as error:
        said = _in_words(error)
        if said is None:
            raise
        _fail(said)


def _in_words(error: Exception) -> DeltaMemError | None:
    """What the system refused, for a person; None for an error that keeps its traceback."""
    if _no_room(error):
        return DeltaMemError(
            "The disk is full, or a limit on files is reached.",
            f"{str(error).strip().splitlines()[0]}.",
            "Nothing was left half-written. Free some space and try again.",
        )
    refused = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
    if isinstance(error, refused) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return DeltaMemError(
            f"{error.filename or 'A file'} cannot be read or written.",
            f"{error.strerror or error}.",
            "Correct the path or its permissions, and try again.",
        )
    return None


def _no_room(error: Exception) -> bool:
    """Whether `error` is a full disk, a quota or a limit, by itself or in the words of safetensors and torch."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    words = (
        "No space left on device",
        "File too large",
        "Disk quota exceeded",
        "iostream error",
        "inline_container.cc",
    )
    return any(said in str(error) for said in words)


def _fail(error: DeltaMemError) -> None:
    click.secho(f"Error: {error.what}", fg="red", err=True)
    for line in (error.why, error.next):
        if line:
            click.echo(line, err=True)
    sys.exit(1)
