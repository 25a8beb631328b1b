"""What a memory holds, and what has changed from one to another, in numbers that JSON can carry. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from deltamem_tool.errors import MemoryStateError
from deltamem_tool.memory.file import StoredMemory, check_memory


def summary(memory: StoredMemory) -> dict[str, Any]:
    """Sizes, and the Frobenius norm of every state, `[B, H]` by layer."""
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
    """What `summary` says of `before`, with all that may differ twice; norms `[B, H]` by layer."""
    said = summary(before)
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
    tokens = None if said["open_tokens"] is None else {"before": said["open_tokens"], "after": _open_tokens(after)}
    kept = {name: value for name, value in said.items() if name != "norms"}
    return kept | {"kind": "difference", "open_tokens": tokens, "changes": changes}


def _norms(states: np.ndarray) -> np.ndarray:
    """`[B, H, R, R]` to `[B, H]`, in float64: squares of large float32 numbers are none."""
    return np.linalg.norm(states.astype(np.float64), axis=(2, 3))


def _open_tokens(memory: StoredMemory) -> list[int] | None:
    """Of each conversation; None where every token writes."""
    segment = next(iter(memory.open_segments.values()), None)
    return None if segment is None else [int(count) for count in segment[:, -1]]


def refuse_unlike(path: str, before: StoredMemory, other: str, after: StoredMemory) -> None:
    """
    Raises:
        MemoryStateError: the memories of the two files are not of one adapter, or not of as many conversations.
    """
    try:
        check_memory(after.shape, after.adapter, before.shape, before.adapter)
    except MemoryStateError as error:
        raise MemoryStateError(
            f"{other} is not of the adapter that wrote {path}.", error.why, "Compare two memories of one adapter."
        ) from error
    found, wanted = (len(next(iter(memory.states.values()))) for memory in (after, before))
    if found != wanted:
        raise MemoryStateError(
            f"{other} and {path} are not of one batch.",
            f"{other} holds {found} conversations, {path} {wanted}.",
            "Compare two memories of the same conversations.",
        )
