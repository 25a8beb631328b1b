"""`deltamem convert`: convert adapters from and to the reference implementation's format."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from deltamem_tool.cli.options import NAME, UserPath, json_option


@click.command()
@click.argument("src", type=NAME)
@click.option("--out", required=True, type=UserPath(), help="Adapter folder to write.")
@click.option(
    "--base", type=NAME, help="Base model, a folder or a Hub id; with --to reference, the recorded one by default."
)
@click.option(
    "--to",
    type=click.Choice(["deltamem", "reference"]),
    default="deltamem",
    show_default=True,
    help="Format to write.",
)
@click.option("--revision", help="Branch, tag or commit of SRC on the Hub.")
@click.option("--base-revision", help="Branch, tag or commit of the base model on the Hub.")
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@json_option
def command(
    src: str,
    out: str,
    base: str | None,
    to: str,
    revision: str | None,
    base_revision: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Convert SRC, an adapter of the reference implementation, to deltamem's format, or back.

    SRC is a folder or a Hub id. The conversion keeps every bit in both directions. The reference implementation does
    not record which model an adapter was trained on, so name it with --base.
    """
    from deltamem_tool.adapter.reference.convert import convert
    from deltamem_tool.cli.console import quiet_libraries

    quiet_libraries()
    result = convert(src, out, base, to, revision, base_revision, overwrite)
    if as_json:
        click.echo(json.dumps({**asdict(result), "path": str(result.path)}))
        return
    dtypes = ", ".join(result.dtypes)
    if to == "deltamem":
        click.echo(f"{result.parameters:,} parameters ({dtypes} in {src}) in {out}, for {result.base.name}.")
        click.echo(f"Next: deltamem inspect {out}")
    else:
        click.echo(f"{result.parameters:,} numbers ({dtypes}) in {out}, for the reference implementation.")
