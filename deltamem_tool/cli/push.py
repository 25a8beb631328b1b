"""`deltamem push`: an adapter, an ONNX folder, or both to the Hub."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from deltamem_tool.hub.push import PushResult

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command("push")
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.argument("repo_id")
@click.option("--onnx", type=_FOLDER, help="An ONNX folder of the same adapter, to go with it.")
@click.option("--base-model", metavar="ID", help="Where the base model is on the Hub, OWNER/NAME[@REVISION].")
@click.option(
    "--evaluation",
    type=click.Path(dir_okay=False, path_type=Path),
    help="What `deltamem eval --out` wrote.  [default: evaluation.json in DIR]",
)
@click.option("--license", help="Licence of the adapter, for the card, such as apache-2.0.")
@click.option("--private", is_flag=True, help="Make a new repository private; one that is there must be.")
@click.option("--branch", help="Push to this branch, which is made if it is not there.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Propose it as a pull request.")
@click.option("--message", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Send nothing: say what would be, and show the card.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(folder: Path, repo_id: str, as_json: bool, dry_run: bool, **options) -> None:
    """Send DIR, an adapter folder or an ONNX folder, to REPO_ID on the Hub, in one commit.

    The model card is written from what is known; words of yours in it are kept. Files that have not changed are not
    sent again. Log in with `hf auth login`.

    \b
    deltamem eval adapter --out adapter/evaluation.json
    deltamem push adapter you/your-adapter --onnx onnx --license apache-2.0
    """
    from deltamem_tool.cli.console import STDERR
    from deltamem_tool.hub.push import push

    ask = None if as_json or dry_run or not sys.stdin.isatty() else _ask_license
    done = push(folder, repo_id, dry_run=dry_run, ask_license=ask, **options)
    if as_json:
        click.echo(json.dumps({**asdict(done), "dry_run": dry_run}))
        return
    for note in done.notes:
        STDERR.print(f"Note: {note}", style="yellow", markup=False, highlight=False)
    _show(done, dry_run)


def _ask_license() -> str | None:
    said = click.prompt(
        "Licence of the adapter (such as apache-2.0 or cc-by-4.0; empty: none)",
        default="",
        show_default=False,
        err=True,
    )
    return said.strip() or None


def _show(done: PushResult, dry_run: bool) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.markdown import Markdown
    from rich.table import Table
    from rich.text import Text

    from deltamem_tool.hub.repository import DELETED, SAME

    changed = [change for change in done.changes if change.kind != SAME]
    if not changed:
        click.echo("The repository holds all of this already. Nothing was sent.")
    elif dry_run:
        table = Table(title=Text(f"A push to {done.repo_id} would change"))
        table.add_column("file")
        table.add_column("size", justify="right")
        table.add_column("")
        for change in done.changes:
            table.add_row(Text(change.path), decimal(change.size), change.kind)
        console = Console()
        console.print(table)
        console.print(Markdown(_body(done.card)))
    else:
        sent = sum(change.size for change in changed if change.kind != DELETED)
        click.echo(f"{len(changed)} of {len(done.changes)} files changed, {decimal(sent)} sent.")
    click.echo(done.url)


def _body(card: str) -> str:
    """The card with its metadata as it is written."""
    from huggingface_hub import ModelCard

    text = ModelCard(card).text
    return f"```yaml\n{card.removesuffix(text).strip()}\n```\n{text}"
