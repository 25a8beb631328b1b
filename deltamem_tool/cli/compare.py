"""`deltamem compare`: compare two evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltamem_tool.cli.options import MARGIN, UserPath

if TYPE_CHECKING:
    from rich.table import Table

    from deltamem_tool.evaluation.report.compare import Comparison, Row

_FILE = UserPath(dir_okay=False, path_type=Path)


@click.command()
@click.argument("a", type=UserPath(path_type=Path))
@click.argument("b", type=UserPath(path_type=Path))
@click.option("--margin", type=MARGIN, help="Margin that a difference must exceed to matter.")
@click.option("--out", type=_FILE, help="Write the result as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(a: Path, b: Path, margin: float | None, out: Path | None, as_json: bool) -> None:
    """Compare two evaluations and print what changed from A to B.

    A and B are folders of `deltamem eval --report`, or evaluation.json files. If both have records of the same
    questions, they are compared question by question, with intervals and a test. Otherwise only their means are
    compared, and the output says so.
    """
    from deltamem_tool.evaluation.report.compare import compare
    from deltamem_tool.io.atomic import check_writable, write_atomically

    if out is not None:
        check_writable(out)
    comparison = compare(a, b, margin)
    payload = comparison.to_json()
    if out is not None:
        write_atomically(out, (json.dumps(payload, indent=1) + "\n").encode())
    if as_json:
        click.echo(json.dumps(payload))
        return
    from deltamem_tool.cli.console import STDOUT

    click.echo(f"A: {a}\nB: {b}")
    STDOUT.print(_table(comparison))
    if comparison.differing:
        STDOUT.print(_settings(comparison))
    for line in [*comparison.notes, *comparison.verdict()]:
        click.echo(f"{line[0].upper()}{line[1:]}.")


def _table(comparison: Comparison) -> Table:
    """One row per condition, in a section for each group."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"{escape(comparison.a.result['task'])}: {escape(comparison.metric)}, B − A with its 95 % interval"
    )
    table.add_column("", style="bold")
    for name in ("A", "B", "B − A", "interval", "p"):
        table.add_column(name, justify="right")
    groups = list(dict.fromkeys(row.group for row in comparison.rows))
    for group in groups:
        table.add_section()
        table.add_row("[dim]all questions[/dim]" if group is None else f"[dim]{escape(group)}[/dim]")
        for row in [*comparison.rows, *comparison.gains]:
            if row.group == group:
                table.add_row(*map(escape, _cells(row)))
    return table


def _cells(row: Row) -> list[str]:
    from deltamem_tool.evaluation.scoring.digits import decimals, number_text, signed_text
    from deltamem_tool.evaluation.scoring.statistics import p_value_text

    after = decimals(row.mean, row.low, row.high)
    interval = f"{signed_text(row.low, after)} to {signed_text(row.high, after)}"
    means = [number_text(row.a[0], after), number_text(row.b[0], after), signed_text(row.mean, after)]
    return [row.label, *means, interval, p_value_text(row.p_value, row.histories)]


def _settings(comparison: Comparison) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("setting", title="Settings that differ")
    for name in ("A", "B"):
        table.add_column(name, overflow="fold")  # a fingerprint is to be copied
    for part, name, a, b in comparison.differing:
        table.add_row(escape(f"{part.lower()}: {name}"), escape(a), escape(b))
    return table
