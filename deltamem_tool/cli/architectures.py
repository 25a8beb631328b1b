"""`deltamem architectures`: list the model types that support a memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from deltamem_tool.base_model.support import Support, summary, supported_types, transformers_version, types_named

if TYPE_CHECKING:
    from rich.table import Table


@click.command("architectures")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with one object per model type.")
def command(name: str | None, as_json: bool) -> None:
    """List the model types of transformers and the memory features that each supports.

    With NAME, list only the types whose name contains it. A checkpoint's type is the `model_type` in its config.json.
    """
    types = types_named(name) if name else supported_types()
    if as_json:
        click.echo(json.dumps([asdict(row) for row in types]))
        return

    from deltamem_tool.cli.console import STDOUT

    STDOUT.print(_table(types))
    for line in summary(types):
        STDOUT.print(line, highlight=False)
    STDOUT.print("Where there is a memory, tokens, messages (SSW) or sentences can write.", highlight=False)


def _table(types: Sequence[Support]) -> Table:
    from rich import box
    from rich.table import Table

    title = f"Model types of transformers {transformers_version()}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("model type", no_wrap=True)
    table.add_column("branches", no_wrap=True)
    table.add_column("ONNX", no_wrap=True)
    table.add_column("what is missing", style="dim")
    for row in types:
        style = "" if row.supported else "yellow"
        branches = " ".join(row.branches) if row.supported else "none"
        table.add_row(row.model_type, branches, "yes" if row.export else "–", row.reason or "", style=style)
    return table
