from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(path, as_json) -> None:
    """Say what PATH is: an adapter folder (or Hub id), or a memory file."""
    said = _memory(path) if Path(path).is_file() else _adapter(path)
    if as_json:
        click.echo(json.dumps(said))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(path), show_header=False)
    for name, value in _flat(said):
        table.add_row(name, str(value))
    Console().print(table)


def _memory(path: str) -> dict:
    import numpy as np

    from deltamem_tool.memory_file import read_memory

    memory = read_memory(path)
    states, adapter = memory.states, memory.adapter
    batch, heads, rank, _ = next(iter(states.values())).shape
    return {
        "kind": "memory",
        "adapter": adapter,
        "conversations": batch,
        "state_heads": heads,
        "rank": rank,
        "bytes": sum(state.nbytes for state in states.values()),
        "norms": {str(layer): round(float(np.linalg.norm(state)), 4) for layer, state in states.items()},
    }


def _adapter(path: str) -> dict:
    from deltamem_tool.adapter import read_adapter

    folder = read_adapter(path)
    return {
        "kind": "adapter",
        "base": asdict(folder.base),
        "mechanism": folder.config.to_dict(),
        "layers": folder.layer_indices,
        "parameters": folder.num_parameters(),
        "memory_bytes": folder.memory_bytes,
    }


def _flat(said: dict, prefix: str = ""):
    for name, value in said.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
