"""The recurrence as two CUDA kernels, forward and backward: a loop over tokens that keeps the state in registers.

README.md in this folder has the equations and the layout. In a kernel, `x_t` is the row of token t of an input,
`grad_x` is dL/dx and `adjoint` is G_t. Ranks are padded with zeros to a power of two; the zeros stay zeros.

To check the kernels on a CPU, set TRITON_INTERPRET=1 before anything imports Triton. This is very slow.
"""

# Arguments of Triton kernels have no types, and its decorator has none.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltamem_tool.errors import ConfigError

TILE = 512  # numbers of a matrix that one warp holds: 16 registers a thread, which leaves room for four matrices
STAGES = 3  # tokens whose loads are in flight: an iteration is far shorter than the way to memory


def triton_scan(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the same as `naive.naive_scan`, for CUDA tensors. Keeps T states `[B, H, R, R]` for the backward pass.

    Every tensor has one dtype, float32 or float64. q, k, v, log_keep, erase, write: [B, T, H, R]; state: [B, H, R, R].
    Returns reads [B, T, H, R] and the state after the last token [B, H, R, R].
    """
    inputs = (q, k, v, log_keep, erase, write, state)
    _check_devices(inputs)
    # Here, because inside of `forward` gradients are always disabled.
    keep_states = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    results: tuple[Tensor, Tensor] = _TritonScan.apply(*inputs, keep_states)  # type: ignore[no-untyped-call]  # of torch
    return results


def _check_devices(inputs: tuple[Tensor, ...]) -> None:
    """Triton itself would say little of a CPU tensor, and nothing of one on another GPU."""
    devices = {x.device for x in inputs}
    interpreted = not isinstance(_forward_kernel, triton.JITFunction)
    if len(devices) == 1 and (interpreted or inputs[0].is_cuda):
        return
    raise ConfigError(
        'The scan cannot run with implementation="triton".',
        f"Its kernels need every tensor on one CUDA device, and these are on {', '.join(sorted(map(str, devices)))}.",
        'Move the model to a CUDA device, or use implementation=None or "chunked", which run anywhere.',
    )


class _TritonScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        q, k, v, log_keep, erase, write, state, keep_states = inputs
        batch, tokens, heads, rank = q.shape
        q, k, v, log_keep, erase, write, state = (x.contiguous() for x in (q, k, v, log_keep, erase, write, state))
        reads, end = torch.empty_like(q), torch.empty_like(state)
        # S_{t-1}, [B, H, T, R, R]; where nothing is kept the kernel gets some pointer and leaves it alone.
        states = state.new_empty((batch, heads, tokens, rank, rank)) if keep_states else end
        columns = triton.next_power_of_2(rank)
        rows = min(columns, TILE // columns)
        with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]  # a launch goes to the current device otherwise
            _forward_kernel[(batch * heads, triton.cdiv(rank, rows))](
                *(q, k, v, log_keep, erase, write, state, reads, end, states, tokens, heads),
                RANK=rank, ROWS=rows, COLUMNS=columns, KEEP_STATES=keep_states, STAGES=STAGES,
                num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
        if keep_states:
            ctx.save_for_backward(q, k, v, log_keep, erase, write, states)
        return reads, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_reads: Tensor, grad_end: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[:-1]
        states = ctx.saved_tensors[-1]
        batch, heads, tokens, rank, _ = states.shape
        grad_reads, grad_end = grad_reads.contiguous(), grad_end.contiguous()
        grads = (*(torch.empty_like(x) for x in inputs), torch.empty_like(grad_end))
        columns = triton.next_power_of_2(rank)
        with torch.cuda.device_of(states):  # type: ignore[no-untyped-call]  # of torch
            _backward_kernel[(batch * heads,)](
                *(*inputs, states, grad_reads, grad_end, *grads, tokens, heads),
                RANK=rank, SIZE=columns, STAGES=STAGES,
                num_warps=max(1, columns * columns // TILE), enable_fp_fusion=True,
            )  # fmt: skip
        return *grads, None


@triton.jit(do_not_specialize=["tokens", "heads"])
def _forward_kernel(
    q, k, v, log_keep, erase, write, state, reads, end, states, tokens, heads,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEEP_STATES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program for ROWS rows of one (b, h): rows do not mix. Grid [B·H, R / ROWS]."""
    program = tl.program_id(0).to(tl.int64)  # 64 bits: B·H·T·R·R passes 2**31
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    rows, columns = row < RANK, column < RANK
    cell = row[:, None] * RANK + column[None, :]
    cells = rows[:, None] & columns[None, :]
    at = (program // heads * tokens * heads + program % heads) * RANK  # token 0 of [B, T, H, R]
    at_state = program * tokens * RANK * RANK  # token 0 of [B, H, T, R, R]

    s = tl.load(state + program * RANK * RANK + cell, cells, 0.0)
    for _ in tl.range(tokens, num_stages=STAGES):
        q_t = tl.load(q + at + column, columns, 0.0)
        k_t = tl.load(k + at + column, columns, 0.0)
        v_t = tl.load(v + at + row, rows, 0.0)
        keep_t = tl.exp(tl.load(log_keep + at + row, rows, 0.0))
        erase_t = tl.load(erase + at + row, rows, 0.0)
        write_t = tl.load(write + at + row, rows, 0.0)
        if KEEP_STATES:
            tl.store(states + at_state + cell, s, cells)
            at_state += RANK * RANK
        tl.store(reads + at + row, tl.sum(s * q_t[None, :], 1), rows)
        change = write_t * v_t - erase_t * tl.sum(s * k_t[None, :], 1)  # d_t
        s = keep_t[:, None] * s + change[:, None] * k_t[None, :]
        at += heads * RANK
    tl.store(end + program * RANK * RANK + cell, s, cells)


@triton.jit(do_not_specialize=["tokens", "heads"])
def _backward_kernel(
    q, k, v, log_keep, erase, write, states, grad_reads, grad_end,
    grad_q, grad_k, grad_v, grad_log_keep, grad_erase, grad_write, grad_state, tokens, heads,
    RANK: tl.constexpr, SIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program for one (b, h), since grad_q and grad_k are sums over rows; last token first. Grid [B·H]."""
    program = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, SIZE), tl.arange(0, SIZE)
    rows, columns = row < RANK, column < RANK
    cell = row[:, None] * RANK + column[None, :]
    cells = rows[:, None] & columns[None, :]
    at = ((program // heads * tokens + tokens - 1) * heads + program % heads) * RANK  # the last token
    at_state = (program * tokens + tokens - 1) * RANK * RANK

    adjoint = tl.load(grad_end + program * RANK * RANK + cell, cells, 0.0)
    for _ in tl.range(tokens, num_stages=STAGES):
        q_t = tl.load(q + at + column, columns, 0.0)
        k_t = tl.load(k + at + column, columns, 0.0)
        v_t = tl.load(v + at + row, rows, 0.0)
        keep_t = tl.exp(tl.load(log_keep + at + row, rows, 0.0))
        erase_t = tl.load(erase + at + row, rows, 0.0)
        write_t = tl.load(write + at + row, rows, 0.0)
        grad_read = tl.load(grad_reads + at + row, rows, 0.0)
        s = tl.load(states + at_state + cell, cells, 0.0)  # S_{t-1}

        predicted = tl.sum(s * k_t[None, :], 1)  # S_{t-1} k_t
        grad_change = tl.sum(adjoint * k_t[None, :], 1)  # G_t k_t
        change = write_t * v_t - erase_t * predicted  # d_t
        erased = erase_t * grad_change
        tl.store(grad_q + at + column, tl.sum(s * grad_read[:, None], 0), columns)
        tl.store(grad_k + at + column, tl.sum(adjoint * change[:, None] - s * erased[:, None], 0), columns)
        tl.store(grad_v + at + row, write_t * grad_change, rows)
        tl.store(grad_log_keep + at + row, keep_t * tl.sum(adjoint * s, 1), rows)
        tl.store(grad_erase + at + row, -predicted * grad_change, rows)
        tl.store(grad_write + at + row, v_t * grad_change, rows)

        adjoint = keep_t[:, None] * adjoint - erased[:, None] * k_t[None, :] + grad_read[:, None] * q_t[None, :]
        at -= heads * RANK
        at_state -= RANK * RANK
    tl.store(grad_state + program * RANK * RANK + cell, adjoint, cells)
