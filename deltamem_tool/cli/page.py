"""`deltamem page`: build a web page that runs an ONNX folder in the visitor's browser."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from deltamem_tool.cli.options import NAME, UserPath, json_option


@click.command("page")
@click.argument("onnx", metavar="ONNX_DIR", type=NAME)
@click.option("--out", type=UserPath(path_type=Path), required=True, help="Folder to write the page to.")
@click.option(
    "--runtime",
    metavar="DIR",
    type=UserPath(file_okay=False, path_type=Path),
    help="node_modules folder of npm with the packages that the page needs.  [default: fetch them from npm, once]",
)
@click.option(
    "--webgpu/--no-webgpu",
    default=True,
    show_default=True,
    help="Use a GPU if there is one; this makes the page 27 MB larger.",
)
@click.option(
    "--cdn",
    metavar="ADDRESS",
    help="Let browsers fetch the packages from this npm CDN, such as https://cdn.jsdelivr.net/npm; packages that "
    "differ from the tested ones do not run.",
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@json_option
def command(
    onnx: str, out: Path, runtime: Path | None, webgpu: bool, cdn: str | None, overwrite: bool, as_json: bool
) -> None:
    """Build a web page with a chat that runs ONNX_DIR, and keeps its memories, in the visitor's browser.

    ONNX_DIR is a folder written by `deltamem export --target web`, or the id of a repository that has one. Any static
    host can serve the page. It contacts only its own host, and the CDN if you set one, and works offline after the
    first visit. To try it: python -m http.server -d site

    Example: deltamem page onnx-web --out site
    """
    from rich.filesize import decimal

    from deltamem_tool.cli.console import STDERR
    from deltamem_tool.page.build import make_page

    def note(text: str) -> None:
        STDERR.print(text, markup=False, highlight=False)

    result = make_page(onnx, out, runtime=runtime, webgpu=webgpu, cdn=cdn, overwrite=overwrite, progress=note)
    if as_json:
        click.echo(json.dumps({**asdict(result), "path": str(result.path)}))
        return
    click.echo(
        f"{result.files} files, {decimal(result.bytes)}, of which the model has {decimal(result.model_bytes)}.",
        err=True,
    )
    click.echo(str(result.path))
