"""The δ-mem recurrence on plain tensors (arXiv 2605.12357); README.md beside this file has the derivation."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import local
from typing import Literal

import torch
from torch import Tensor

from deltamem_tool.errors import ConfigError
from deltamem_tool.ops.chunked import chunked_scan
from deltamem_tool.ops.cumulative_sums import cumulative_sums
from deltamem_tool.ops.naive import naive_scan
from deltamem_tool.ops.onnx_scan import linear_attention_scan, linear_attention_sums
from deltamem_tool.ops.portable_scan import portable_scan, portable_sums
from deltamem_tool.ops.recurrent import recurrent_scan

__all__ = ["Implementation", "delta_scan", "full_precision", "segment_sums", "use_implementation"]

Implementation = Literal["naive", "recurrent", "chunked", "triton", "onnx", "portable"]


def _triton_scan(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """`triton_scan.triton_scan`, imported when it is asked for: Triton is not a dependency."""
    try:
        from deltamem_tool.ops.triton_scan import triton_scan
    except ImportError as error:
        raise ConfigError(
            'The scan cannot run as implementation="triton".',
            f"Triton cannot be imported: {error}.",
            "PyTorch for CUDA brings it along on Linux; elsewhere leave the choice open (implementation=None).",
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
_SUMS = {"onnx": linear_attention_sums, "portable": portable_sums}  # of implementations that are for tracing
# What each thread has chosen, as `name`. Not a context variable: torch.compile breaks the graph at a look at one.
_DEFAULT = local()

# Forward + backward on one thread of a 2.5 GHz Xeon, R = 8, token loop against chunks: 36 ms against 146 at B·H = 128
# and T = 100, 54 against 77 at B·H = 16 and T = 512, 38 against 8 at B·H = 1 and T = 512.
RECURRENT_ROWS = 16  # B·H from which the token loop is the faster one on a CPU
RECURRENT_TOKENS = 16  # and T up to which it is, whatever the rows
RECURRENT_RANK = 16  # above, the loop's R×R work a token outweighs what it saves


@contextmanager
def use_implementation(name: Implementation) -> Iterator[None]:
    """Inside the block, in this thread, `delta_scan` runs `name` where its caller leaves the choice open."""
    outside = _default()
    _DEFAULT.name = name
    try:
        yield
    finally:
        _DEFAULT.name = outside


def _default() -> Implementation | None:
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
    """Read and write an associative memory, token after token.

    For every token t, the read comes before the write (arXiv 2605.12357, the δ-mem update; gates act on state rows):

        reads_t    = S_{t-1} q_t
        S_t[i, :]  = exp(log_keep_t[i]) S_{t-1}[i, :] - erase_t[i] (S_{t-1} k_t)[i] k_t + write_t[i] v_t[i] k_t

    Args:
        q, k, v: [B, T, H, R], used as they are: normalise q and k first.
        log_keep, erase, write: [B, T, H, R], one gate per state row; log_keep <= 0. A token that must not write has
            log_keep = erase = write = 0.
        state: [B, H, R, R], indexed [value row i, key column j]; T may be 0, which gives it back.
        implementation: "naive" (the equation, slow), "recurrent" (a token loop with its gradient written out),
            "chunked" (parallel; for torch.export with a dynamic T), "triton" (the token loop as a CUDA kernel), "onnx"
            (ONNX Runtime's operator, in an ONNX export only), "portable" (a loop that becomes standard ONNX in an
            export), or None for "recurrent" or "chunked", whichever is the faster.

    Returns:
        reads [B, T, H, R] and the state after the last token [B, H, R, R], in the inputs' common dtype, but at least
        float32.
    """
    tokens = {"q": q, "k": k, "v": v, "log_keep": log_keep, "erase": erase, "write": write}
    _check_shapes(tokens, state)
    name = implementation or _default() or _fastest(q)
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


def segment_sums(x: Tensor, last: Tensor | None, carried: Tensor) -> tuple[Tensor, Tensor]:
    """What `ops.cumulative_sums` computes; in an ONNX export, by operators of what shall run it."""
    return _SUMS.get(_default() or "", cumulative_sums)(x, last, carried)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast, which would run matrix products in half precision. Where there is none, nothing is done: the
    context itself takes as long as two small operations."""
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
