"""`deltamem push`: publish an adapter, an ONNX folder, or both on the Hub."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamem_tool.cli.options import NAME, UserPath, json_option

if TYPE_CHECKING:
    from deltamem_tool.hub.push import PushResult

_FOLDER = UserPath(file_okay=False, path_type=Path)


@click.command("push")
@click.argument("folder", metavar="DIR", type=NAME)
@click.argument("repo_id")
@click.option("--onnx", type=_FOLDER, help="ONNX folder of the same adapter, to push with it.")
@click.option("--base-model", metavar="ID", help="Hub id of the base model, OWNER/NAME[@REVISION].")
@click.option(
    "--evaluation",
    type=UserPath(dir_okay=False, path_type=Path),
    help="Result of `deltamem eval --out`, for the model card.  [default: evaluation.json in DIR]",
)
@click.option("--license", help="Licence of the adapter, for the model card, such as apache-2.0.")
@click.option("--private", is_flag=True, help="Make a new repository private; an existing one must be private.")
@click.option("--branch", help="Branch to push to, created if it does not exist.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request with the changes.")
@click.option("--message", help="Commit message.")
@click.option(
    "--space", is_flag=True, help="Also push a web page of the ONNX folder, as a static Space: see `deltamem page`."
)
@click.option("--runtime", metavar="DIR", type=_FOLDER, help="With --space: as in `deltamem page`.")
@click.option("--dry-run", is_flag=True, help="Send nothing; show what would change, and the model card.")
@json_option
def command(folder: str, repo_id: str, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Push DIR (an adapter folder, builtin:adapter, or an ONNX folder) to REPO_ID on the Hub, in one commit.

    The model card describes the adapter; text that you have added to it is kept. Files that have not changed are not
    sent again. Log in first with `hf auth login`.

    Example: deltamem push adapter you/your-adapter --onnx onnx --license apache-2.0
    """
    from deltamem_tool.cli.console import STDERR
    from deltamem_tool.hub.push import push

    ask = None if as_json or dry_run or not sys.stdin.isatty() else _ask_license

    def show_progress(text: str) -> None:
        STDERR.print(text, markup=False, highlight=False)

    result = push(folder, repo_id, dry_run=dry_run, ask_license=ask, progress=show_progress, **options)
    if as_json:
        click.echo(json.dumps({**asdict(result), "dry_run": dry_run}))
        return
    for note in result.notes:
        STDERR.print(f"Note: {note}", style="yellow", markup=False, highlight=False)
    _show(result, dry_run)


def _ask_license() -> str | None:
    answer = click.prompt(
        "Licence of the adapter (such as apache-2.0 or cc-by-4.0; empty: none)",
        default="",
        show_default=False,
        err=True,
    )
    return str(answer).strip() or None


def _show(result: PushResult, dry_run: bool) -> None:
    from rich.filesize import decimal
    from rich.markdown import Markdown
    from rich.table import Table
    from rich.text import Text

    from deltamem_tool.cli.console import STDOUT
    from deltamem_tool.hub.repository import DELETED, SAME

    changed = [change for change in result.changes if change.kind != SAME]
    if not changed:
        click.echo("The repository already has all of this. Nothing was sent.")
    elif dry_run:
        table = Table(title=Text(f"A push to {result.repo_id} would change"))
        table.add_column("file")
        table.add_column("size", justify="right")
        table.add_column("")
        for change in result.changes:
            table.add_row(Text(change.path), decimal(change.size), change.kind)
        STDOUT.print(table)
        STDOUT.print(Markdown(_body(result.card)))
    else:
        sent = sum(change.size for change in changed if change.kind != DELETED)
        click.echo(f"{len(changed)} of {len(result.changes)} files changed, {decimal(sent)} sent.")
    click.echo(result.url)
    if result.space is not None:
        sent = sum(change.size for change in result.space_changes if change.kind not in (SAME, DELETED))
        click.echo(f"The page, {decimal(sent)} {'to send' if dry_run else 'sent'}: {result.space}")


def _body(card: str) -> str:
    """Return the model card as Markdown, with its metadata in a YAML block."""
    from huggingface_hub import ModelCard

    text = ModelCard(card).text
    return f"```yaml\n{card.removesuffix(text).strip()}\n```\n{text}"
