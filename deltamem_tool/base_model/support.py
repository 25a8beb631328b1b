"""The table of supported model types for `deltamem architectures`, measured with tiny models of every type.

Whether a given model is supported is decided by `attention.attention_layers`, which recognises a layout in the model's
modules. That needs a built model, so the table is shipped. `tests/base_model/support_table.py` writes it.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltamem_tool.errors import ArchitectureError

TABLE = Path(__file__).parents[1] / "assets" / "architectures.json"


@dataclass(frozen=True)
class Support:
    """The support for a model type."""

    model_type: str
    supported: bool
    branches: list[str]  # branches that can be corrected in every attention layer
    export: bool  # whether its ONNX graph is tested
    reason: str | None  # why it cannot have a memory, or not in every checkpoint, or not on every branch


def supported_types() -> list[Support]:
    """Return every type that AutoModelForCausalLM of `transformers_version()` knows, by name."""
    return [Support(**row) for row in json.loads(TABLE.read_text(encoding="utf-8"))["types"]]


def transformers_version() -> str:
    """Return the version of transformers whose types the table lists."""
    return str(json.loads(TABLE.read_text(encoding="utf-8"))["transformers"])


def types_named(part: str) -> list[Support]:
    """Return the types that have `part` in their name, ignoring case and the kind of dash.

    Raises:
        ArchitectureError: no type has it.
    """
    types = supported_types()
    matches = [row for row in types if _plain(part) in _plain(row.model_type)]
    if not matches:
        near = difflib.get_close_matches(_plain(part), [row.model_type for row in types], n=3, cutoff=0.5)
        raise ArchitectureError(
            f"No model type of transformers {transformers_version()} has {part!r} in its name.",
            f"Similar ones are {', '.join(near)}." if near else "",
            "`deltamem architectures` lists them all. For a newer or custom model, try `deltamem patch`.",
        )
    return matches


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def summary(types: Sequence[Support]) -> list[str]:
    """Return the counts of supported types, as lines of text."""
    taken = Counter(", ".join(row.branches) for row in types if row.supported)
    by_branches = "; ".join(f"{count} on {branches}" for branches, count in taken.most_common())
    return [
        f"With a memory: {taken.total()} of {len(types)}" + (f" ({by_branches})." if taken else "."),
        f"With a tested ONNX export: {sum(row.export for row in types)}.",
    ]
