"""`deltamem inspect`: describe a folder or a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamem_tool.cli.options import NAME, UserPath
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.io.atomic import check_writable, resolve
from deltamem_tool.io.installation import check_installation
from deltamem_tool.io.pictures import picture_format
from deltamem_tool.onnx.locate import is_onnx

if TYPE_CHECKING:
    from rich.table import Table


@click.command()
@click.argument("path", type=NAME)
@click.argument("other", required=False, type=NAME)
@click.option(
    "--plot",
    type=UserPath(dir_okay=False, path_type=Path),
    help="Plot a memory's states, or the changes, to FILE; its extension sets the format: .png, .svg, .pdf, .jpg, …",
)
@click.option(
    "--row",
    type=click.IntRange(min=0),
    help="Index of the conversation that the table and the plot show.  [default: 0]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; for a memory file, of all its conversations.")
def command(path: str, other: str | None, plot: Path | None, row: int | None, as_json: bool) -> None:
    """Describe PATH: an adapter folder, an ONNX folder, a Hub id of either, or a memory file.

    With a second memory file OTHER, show what changed from PATH to OTHER.
    """
    if Path(path).is_file():
        document, tables = _memory(path, other, plot, row or 0)
    else:
        for_memory = [("OTHER", other), ("--plot", plot), ("--row", row)]
        unused = [name for name, value in for_memory if value is not None]
        if unused:
            raise click.UsageError(f"{', '.join(unused)}: only for a memory file; {path} is not a file.")
        document, tables = _onnx(path) if is_onnx(path) else _adapter(path)
    if as_json:
        click.echo(json.dumps(document))
        return

    from deltamem_tool.cli.console import STDOUT

    for table in tables:
        STDOUT.print(table)
    if plot is not None:
        click.echo(f"Plot: {plot}")


def _memory(path: str, other: str | None, plot: Path | None, row: int) -> tuple[dict[str, Any], list[Table]]:
    """Describe one memory file, or compare two: for JSON, and as tables; draw the picture."""
    from deltamem_tool.memory.file import read_memory
    from deltamem_tool.memory.inspect import check_comparable, difference, summary

    if plot is not None:
        check_installation("plot")
        picture_format(plot)
        check_writable(plot)
        if any(resolve(plot) == resolve(name) for name in (path, other) if name):
            raise DeltaMemError(
                f"{plot} is the memory file itself.", "The picture would replace it.", "Choose another file for --plot."
            )
    memory = read_memory(path)
    after = None if other is None else read_memory(other)
    if other is not None and after is not None:
        check_comparable(path, memory, other, after)
    document = summary(memory)
    if row >= document["conversations"]:
        raise click.BadParameter(f"{path} has conversations 0 to {document['conversations'] - 1}", param_hint="--row")
    picked = {layer: state[row] for layer, state in memory.states.items()}
    title = (
        f"conversation {row} of {document['conversations']} (the first is 0); " if document["conversations"] > 1 else ""
    )
    title += f"layers: {len(picked)}, state heads: {document['state_heads']}, rank: {document['rank']}"
    if other is None or after is None:
        if plot is not None:
            from deltamem_tool.memory.plot import plot_memory

            plot_memory(picked, plot, f"Memory: {_short(path)}\n{title}")
        return document, [_facts(path, _memory_lines(document)), _norm_table(document, row)]
    if plot is not None:
        from deltamem_tool.memory.plot import plot_difference

        changed = {layer: state[row] for layer, state in after.states.items()}
        plot_difference(picked, changed, plot, f"Difference: from {_short(path)} to {_short(other)}\n{title}")
    document = difference(memory, after) | {"before": path, "after": other}
    return document, [_facts(f"{path} → {other}", _memory_lines(document)), _change_table(document, row)]


def _memory_lines(summary: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The lines of a memory's table."""
    yield "adapter", f"{summary['adapter'][:16]}…"
    yield "conversations", summary["conversations"]
    yield "layers", ", ".join(map(str, summary["layers"]))
    yield "state heads", summary["state_heads"]
    yield "rank", summary["rank"]
    yield "bytes", f"{summary['bytes']:,}"
    tokens = summary["open_tokens"]
    if isinstance(tokens, dict):
        tokens = [f"{old} → {new}" for old, new in zip(tokens["before"], tokens["after"], strict=True)]
    if tokens is not None:
        yield "open tokens", ", ".join(map(str, tokens))


def _facts(title: str, lines: Iterable[tuple[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), show_header=False)  # not markup: a name may have brackets
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")  # a fingerprint is to be copied
    for name, value in lines:
        table.add_row(name, Text(str(value)))
    return table


def _norm_table(document: dict[str, Any], row: int) -> Table:
    from rich.table import Table

    table = Table(title=f"Norms, conversation {row}")
    table.add_column("layer", justify="right", style="bold")
    for head in range(document["state_heads"]):
        table.add_column(f"head {head}", justify="right")
    for layer, norms in document["norms"].items():
        table.add_row(layer, *(f"{norm:.4g}" for norm in norms[row]))
    return table


def _change_table(document: dict[str, Any], row: int) -> Table:
    from rich.table import Table

    names = ("before", "after", "difference", "relative")
    table = Table(title=f"Norms, conversation {row}")
    for column in ("layer", "head", "before", "after", "difference", "relative change"):
        table.add_column(column, justify="right")
    for layer, change in document["changes"].items():
        heads = zip(*(change[name][row] for name in names), strict=True)
        for head, (before, after, norm, relative) in enumerate(heads):
            share = "–" if relative is None else f"{relative:.1%}"
            table.add_row("" if head else layer, str(head), f"{before:.4g}", f"{after:.4g}", f"{norm:.4g}", share)
        table.add_section()
    return table


def _short(path: str) -> str:
    """A file's name, cut in the middle to fit over a picture."""
    name = Path(path).name
    return name if len(name) <= 28 else f"{name[:13]}…{name[-14:]}"


def _adapter(path: str) -> tuple[dict[str, Any], list[Table]]:
    """Describe an adapter: for JSON, and as tables."""
    from deltamem_tool.adapter.folder import read_adapter

    folder = read_adapter(path)
    document = {
        "kind": "adapter",
        "fingerprint": folder.fingerprint,
        "base": asdict(folder.base),
        "mechanism": folder.config.to_dict(),
        "layers": folder.layer_indices,
        "parameters": folder.num_parameters(),
        "memory_bytes": folder.memory_bytes,
    }
    facts = document | {"mechanism": asdict(folder.config)}
    return document, [_facts(path, _flat(facts))]


def _onnx(path: str) -> tuple[dict[str, Any], list[Table]]:
    """Describe an ONNX folder: its manifest for JSON; as tables, also the inputs and outputs of its graph."""
    from rich.table import Table
    from rich.text import Text

    from deltamem_tool.onnx.locate import find_onnx
    from deltamem_tool.onnx.manifest import Manifest
    from deltamem_tool.onnx.signature_table import rows

    manifest = Manifest.read(find_onnx(path))
    document = {"kind": "onnx", **asdict(manifest)}
    tables = {kind: Table(title=title, show_header=False, show_lines=True) for kind, title in _KINDS.items()}
    for table in tables.values():
        table.add_column(no_wrap=True, overflow="fold")  # a size is told by its whole name
        table.add_column()
    for row in rows(manifest.interface):
        shape = ", ".join(map(str, row.shape))
        tables[row.kind].add_row(Text(row.name), Text(f"{row.type} [{shape}]\n{row.meaning}"))
    facts = {name: value for name, value in document.items() if name != "interface"}
    facts["mechanism"] = DeltaMemConfig.current_names(manifest.mechanism)
    return document, [_facts(path, _flat(facts)), *(table for table in tables.values() if table.rows)]


_KINDS = {  # of `signature_table.Row`
    "input": "Inputs of the graph",
    "default": "Inputs of the graph that can be left out",
    "output": "Outputs of the graph",
}


def _flat(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", ", ".join(map(str, value))
        elif value is not None:
            yield f"{prefix}{name}", f"{value:,}" if type(value) is int else value
