from __future__ import annotations

import json
from dataclasses import asdict

import click


@click.command()
@click.argument("src")
@click.option("--out", required=True, type=click.Path(), help="Adapter folder to write.")
@click.option("--base", help="Base model, a folder or a Hub id; --to reference finds the recorded one by itself.")
@click.option(
    "--to",
    type=click.Choice(["deltamem", "reference"]),
    default="deltamem",
    show_default=True,
    help="Whose format to write.",
)
@click.option("--revision", help="Branch, tag or commit of SRC on the Hub.")
@click.option("--base-revision", help="Branch, tag or commit of the base model on the Hub.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(src, out, base, to, revision, base_revision, overwrite, as_json) -> None:
    """Convert SRC, an adapter of the reference implementation, to one of deltamem; or back.

    SRC is a folder or a Hub id. Both ways keep every bit. The reference does not record which model an adapter was
    trained on: say it with --base.
    """
    from deltamem_tool.adapter.reference.convert import convert
    from deltamem_tool.cli.console import quiet_libraries

    quiet_libraries()
    done = convert(src, out, base, to, revision, base_revision, overwrite)
    if as_json:
        click.echo(json.dumps({**asdict(done), "path": str(done.path)}))
        return
    dtypes = ", ".join(done.dtypes)
    if to == "deltamem":
        click.echo(f"{done.parameters:,} parameters ({dtypes} in {src}) in {out}, for {done.base.name}.")
        click.echo(f"Next: deltamem inspect {out}")
    else:
        click.echo(f"{done.parameters:,} numbers ({dtypes}) in {out}, for the reference implementation.")
