"""Describe a memory, or the changes between two memories, in numbers for JSON. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from deltamem_tool.errors import MemoryStateError
from deltamem_tool.memory.file import StoredMemory, check_memory


def summary(memory: StoredMemory) -> dict[str, Any]:
    """Return the sizes of a memory and the Frobenius norm of every state, `[B, H]` by layer."""
    batch, heads, rank, _ = next(iter(memory.states.values())).shape
    return {
        "kind": "memory",
        "adapter": memory.adapter,
        "conversations": batch,
        "layers": list(memory.states),
        "state_heads": heads,
        "rank": rank,
        "bytes": sum(tensor.nbytes for tensor in memory.tensors().values()),
        "open_tokens": _open_tokens(memory),
        "norms": {str(layer): _norms(state).tolist() for layer, state in memory.states.items()},
    }


def difference(before: StoredMemory, after: StoredMemory) -> dict[str, Any]:
    """Return the `summary` of `before`, with values that may differ for both memories; norms `[B, H]` by layer."""
    facts = summary(before)
    changes = {}
    for layer, old in before.states.items():
        norms, change = _norms(old), _norms(np.subtract(after.states[layer], old, dtype=np.float64))
        relative = np.divide(change, norms, out=np.full_like(norms, np.nan), where=norms > 0)
        changes[str(layer)] = {
            "before": norms.tolist(),
            "after": _norms(after.states[layer]).tolist(),
            "difference": change.tolist(),
            "relative": [[None if value != value else value for value in heads] for heads in relative.tolist()],
        }
    tokens = None if facts["open_tokens"] is None else {"before": facts["open_tokens"], "after": _open_tokens(after)}
    del facts["norms"]
    return facts | {"kind": "difference", "open_tokens": tokens, "changes": changes}


def _norms(states: np.ndarray) -> np.ndarray:
    """Return the norms `[B, H]` of states `[B, H, R, R]`, in float64 because large float32 numbers overflow."""
    norms: np.ndarray = np.linalg.norm(states.astype(np.float64), axis=(2, 3))
    return norms


def _open_tokens(memory: StoredMemory) -> list[int] | None:
    """Return the number of open tokens of each conversation; None if every token writes."""
    segment = next(iter(memory.open_segments.values()), None)
    return None if segment is None else [int(count) for count in segment[:, -1]]


def check_comparable(path: str, before: StoredMemory, other: str, after: StoredMemory) -> None:
    """Check that two memories can be compared.

    Raises:
        MemoryStateError: the memories belong to different adapters, or differ in the number of conversations.
    """
    try:
        check_memory(after.shape, after.adapter, before.shape, before.adapter)
    except MemoryStateError as error:
        raise MemoryStateError(
            f"{other} was not written by the adapter that wrote {path}.",
            error.why,
            "Compare two memories of the same adapter.",
        ) from error
    rows, other_rows = (len(next(iter(memory.states.values()))) for memory in (before, after))
    if rows != other_rows:
        raise MemoryStateError(
            f"{other} and {path} have different batch sizes.",
            f"{other} has {other_rows} conversations, {path} {rows}.",
            "Compare two memories of the same conversations.",
        )
