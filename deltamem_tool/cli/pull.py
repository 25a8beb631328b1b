"""`deltamem pull`: an adapter, an ONNX folder, or both from the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("pull")
@click.argument("repo_id")
@click.option("--revision", help="Branch, tag or commit; or write REPO_ID@REVISION.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Copy it to this folder.  [default: stay in the Hub's cache]"
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(repo_id: str, revision: str | None, out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Fetch what REPO_ID holds, check it, and print where it is.

    Every other command takes REPO_ID by itself: this is for looking at the files, or for working without a network
    later. Nothing but adapter, ONNX folder and card is fetched.
    """
    from deltamem_tool.hub.pull import pull

    done = pull(repo_id, revision, out, overwrite)
    if as_json:
        said = {
            "path": str(done.path),
            "commit": done.commit,
            "adapter": done.contents.adapter is not None,
            "onnx": done.contents.onnx is not None,
            "files": sorted(done.contents.files),
        }
        click.echo(json.dumps(said))
        return
    click.echo(
        f"{repo_id} holds {' and '.join(f'an {part}' for part in done.contents.parts)}; commit {done.commit}.", err=True
    )
    click.echo(str(done.path))
