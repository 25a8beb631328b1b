"""`deltamem page`: a page that runs an ONNX folder in the visitor's browser."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from deltamem_tool.cli.options import NAME, UserPath, json_option


@click.command("page")
@click.argument("onnx", metavar="ONNX_DIR", type=NAME)
@click.option("--out", type=UserPath(path_type=Path), required=True, help="The folder to make.")
@click.option(
    "--runtime",
    metavar="DIR",
    type=UserPath(file_okay=False, path_type=Path),
    help="npm's node_modules with the packages that the page needs.  [default: fetch them from npm, once]",
)
@click.option(
    "--webgpu/--no-webgpu",
    default=True,
    show_default=True,
    help="Compute on a GPU where there is one; the page is 27 MB larger.",
)
@click.option(
    "--cdn",
    metavar="ADDRESS",
    help="Have browsers fetch the packages from this CDN of npm's, such as https://cdn.jsdelivr.net/npm, and run none "
    "that is another than was tested.",
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@json_option
def command(
    onnx: str, out: Path, runtime: Path | None, webgpu: bool, cdn: str | None, overwrite: bool, as_json: bool
) -> None:
    """Make a page of ONNX_DIR for any static host: a chat that runs, and keeps its memories, in the visitor's browser.

    ONNX_DIR is what `deltamem export --target web` wrote, or the id of a repository that has one. The page asks nobody
    but its own host, and the CDN where it has one; it works without a network after the first visit. Try it:
    python -m http.server -d site

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
