"""The scan: every token reads the state, then writes it. One function with six implementations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import local
from typing import Literal

import torch
from torch import Tensor

from deltamem_tool.errors import ConfigError
from deltamem_tool.ops.chunked import chunked_scan
from deltamem_tool.ops.naive import naive_scan
from deltamem_tool.ops.onnx_scan import linear_attention_scan
from deltamem_tool.ops.portable_scan import portable_scan
from deltamem_tool.ops.recurrent import recurrent_scan

Implementation = Literal["naive", "recurrent", "chunked", "triton", "onnx", "portable"]


def _triton_scan(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    try:
        from deltamem_tool.ops.triton_scan import triton_scan
    except ImportError as error:
        raise ConfigError(
            'The scan cannot run with implementation="triton".',
            f"Triton cannot be imported: {error}.",
            "Install PyTorch for CUDA on Linux, which includes it, or use implementation=None.",
        ) from error
    return triton_scan(*inputs)


_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "naive": naive_scan,
    "recurrent": recurrent_scan,
    "chunked": chunked_scan,
    "triton": _triton_scan,
    "onnx": linear_attention_scan,
    "portable": portable_scan,
}
# What each thread has chosen, as `name`. Not a context variable: torch.compile breaks the graph at a look at one.
_DEFAULT = local()

# Forward + backward on one thread of a 2.5 GHz Xeon, R = 8, token loop against chunks: 36 ms against 146 at B·H = 128
# and T = 100, 54 against 77 at B·H = 16 and T = 512, 38 against 8 at B·H = 1 and T = 512.
RECURRENT_ROWS = 16  # B·H from which the token loop is the faster one on a CPU
RECURRENT_TOKENS = 16  # and T up to which it is, whatever the rows
RECURRENT_RANK = 16  # above, the loop's R×R work a token outweighs what it saves


@contextmanager
def use_implementation(name: Implementation) -> Iterator[None]:
    """Set the default implementation of `delta_scan` to `name`, inside the block and in this thread."""
    outside = default_implementation()
    _DEFAULT.name = name
    try:
        yield
    finally:
        _DEFAULT.name = outside


def default_implementation() -> Implementation | None:
    """Return the default set by `use_implementation`."""
    return getattr(_DEFAULT, "name", None)


def delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor,
    erase: Tensor,
    write: Tensor,
    state: Tensor,
    *,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor]:
    """Read and write an associative memory, token by token.

    For every token t, the read comes before the write (arXiv 2605.12357, the δ-mem update; gates act on state rows):

        reads_t    = S_{t-1} q_t
        S_t[i, :]  = exp(log_keep_t[i]) S_{t-1}[i, :] - erase_t[i] (S_{t-1} k_t)[i] k_t + write_t[i] v_t[i] k_t

    Args:
        q: [B, T, H, R], used as is: normalise it first.
        k: [B, T, H, R], used as is: normalise it first.
        v: [B, T, H, R].
        log_keep: [B, T, H, R], one gate per state row, <= 0. A token that must not write has
            log_keep = erase = write = 0.
        erase: [B, T, H, R].
        write: [B, T, H, R].
        state: [B, H, R, R], indexed [value row i, key column j]; T may be 0, which returns it.
        implementation: "naive" (the equation; slow), "recurrent" (a loop over tokens with an explicit gradient),
            "chunked" (parallel; for torch.export with a dynamic T), "triton" (the loop as a CUDA kernel), "onnx" (ONNX
            Runtime's operator, only in an ONNX export), or "portable" (a loop that becomes standard ONNX in an export).
            None picks "recurrent" or "chunked", whichever is faster.

    Returns:
        reads [B, T, H, R] and the state after the last token [B, H, R, R], in the inputs' common dtype, but at least
        float32.

    Raises:
        ValueError: the shapes do not match, or there is no implementation of that name.
    """
    tokens = {"q": q, "k": k, "v": v, "log_keep": log_keep, "erase": erase, "write": write}
    _check_shapes(tokens, state)
    name = implementation or default_implementation() or _fastest(q)
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {sorted(_IMPLEMENTATIONS)} or None, not {name!r}")

    inputs = list(tokens.values())
    if any(x.dtype != torch.float32 for x in (*inputs, state)):
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in (*inputs, state)), torch.float32)
        inputs, state = [x.to(dtype) for x in inputs], state.to(dtype)
    if q.shape[1] == 0:
        return torch.empty_like(inputs[0]), state
    with full_precision(q.device):
        return _IMPLEMENTATIONS[name](*inputs, state)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast, which would run matrix products in half precision."""
    # Only where it is on: the context takes as long as two small operations.
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def _fastest(q: Tensor) -> Implementation:
    batch, tokens, heads, rank = q.shape
    if torch.compiler.is_exporting():
        return "chunked"
    if tokens == 1:
        return "recurrent"
    if q.device.type != "cpu" or rank > RECURRENT_RANK:
        return "chunked"
    return "recurrent" if batch * heads >= RECURRENT_ROWS or tokens <= RECURRENT_TOKENS else "chunked"


def read_state(state: Tensor, q: Tensor) -> Tensor:
    """Read without writing: `[B, H, R, R]` and `[B, T, H, R]` to readings `[B, T, H, R]`."""
    return torch.einsum("bhij,bthj->bthi", state, q)


def _check_shapes(tokens: dict[str, Tensor], state: Tensor) -> None:
    q = tokens["q"]
    if q.dim() != 4:
        raise ValueError(f"q must be [B, T, H, R], not {list(q.shape)}")
    for name, x in tokens.items():
        if x.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {list(q.shape)}, not {list(x.shape)}")
    batch, _, heads, rank = q.shape
    if state.shape != (batch, heads, rank, rank):
        raise ValueError(f"state must be [B, H, R, R] = {[batch, heads, rank, rank]}, not {list(state.shape)}")
