"""`deltamem pull`: fetch an adapter, an ONNX folder, or both from the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import click

from deltamem_tool.cli.options import UserPath, json_option


@click.command("pull")
@click.argument("repo_id")
@click.option("--revision", help="Branch, tag or commit; you can also write REPO_ID@REVISION.")
@click.option(
    "--out", type=UserPath(path_type=Path), help="Folder to copy the files to.  [default: keep them in the Hub's cache]"
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@json_option
def command(repo_id: str, revision: str | None, out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Fetch the adapter and the ONNX folder of REPO_ID, check them, and print where they are.

    Other commands accept REPO_ID directly. Use this one to look at the files, or to work offline later. Only the
    adapter, the ONNX folder and the model card are fetched.
    """
    from deltamem_tool.hub.pull import pull

    result = pull(repo_id, revision, out, overwrite)
    if as_json:
        document = {
            "path": str(result.path),
            "commit": result.commit,
            "adapter": result.contents.adapter is not None,
            "onnx": result.contents.onnx is not None,
            "files": sorted(result.contents.files),
        }
        click.echo(json.dumps(document))
        return
    parts = " and ".join(f"an {part}" for part in result.contents.parts)
    click.echo(f"{repo_id} contains {parts}; commit {result.commit}.", err=True)
    click.echo(str(result.path))
