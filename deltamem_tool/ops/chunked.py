"""The recurrence in chunks of tokens: a few large batched operations instead of T small ones.

README.md in this folder has the derivation. Below, there are N chunks of C tokens. Inside a chunk, t is the token that
reads, and s < t are the tokens written before it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Forward + backward at T = 8,192, B = H = 1, R = 8, one thread, busy 2.5 GHz Xeon: 82 ms at 16, 93 at 32, 134 at 64.
# 32 and not 16: half as many chunks to pass the state through. At 64 with two threads and another process on one of the
# cores, the triangular solve alone went from milliseconds to seconds (B = 32, T = 100, H = 4); at 32 it did not.
CHUNK = 32

# Decays below exp(-40) = 4e-18 are rounded up to it: invisible beside numbers of order one, even in float64, and it
# keeps products of two decays out of float32's denormal range, where exp was measured 80 times slower.
LOG_DECAY_FLOOR = -40.0

# In an exported graph N is symbolic and the depth of the parallel pass a constant: 2**20 chunks are 33 million tokens,
# for which the pairwise decays of a single row of the state would take 4 GB.
EXPORT_LEVELS = 20

# For its backward pass a scan keeps some five tensors of [B, T, H, R, C] numbers: with four states in every layer, four
# layers 1,024 wide, a sixth of what a training step takes. From so many numbers on, it runs again instead: 118 ms, not
# 102, at T = 2,048, H = 4, R = 8.
RECOMPUTED = 2**20


def chunked_scan(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the same as `naive.naive_scan`, parallel over chunks.

    Every tensor has one dtype, T > 0. q, k, v, log_keep (<= 0), erase, write: [B, T, H, R]; state: [B, H, R, R].
    Returns reads [B, T, H, R] and the state after the last token [B, H, R, R].
    """
    inputs = (q, k, v, log_keep, erase, write, state)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or q.numel() * CHUNK < RECOMPUTED:
        return _scan(*inputs)
    results: tuple[Tensor, Tensor] = checkpoint(_scan, *inputs, use_reentrant=False, preserve_rng_state=False)
    return results


def _scan(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    tokens = q.shape[1]
    symbolic = torch.compiler.is_exporting()
    cut = _cut_symbolic if symbolic else _cut

    def split(x: Tensor, *order: int) -> Tensor:
        return cut(x).permute(order).contiguous()

    q, k = (split(x, 1, 0, 3, 2, 4) for x in (q, k))  # [N, B, H, C, R]
    v, log_keep, erase, write = (split(x, 1, 0, 3, 4, 2) for x in (v, log_keep, erase, write))  # [N, B, H, R, C]

    total = log_keep.double().cumsum(-1)  # log G_t
    before = F.pad(total[..., :-1], (1, 0))  # log G_{t-1}
    decay = _pairwise_decay(before, total, log_keep.dtype)  # [N, B, H, R, C, C]
    from_start = _exp(before, log_keep.dtype)  # G_{t-1}, [N, B, H, R, C]
    to_end = _exp(total[..., -1:] - total, log_keep.dtype)  # G_C / G_s, [N, B, H, R, C]
    chunk_decay = _exp(total[..., -1], log_keep.dtype)  # G_C, [N, B, H, R]

    # (I + A) d = write v - erase G_{t-1} K S0^T for every S0 at once: the solution is [u | W], d = u - W S0^T.
    # It is kept transposed, [1 + R, C]: that is the solver's own memory layout.
    k_t = k.mT
    a = decay * (k @ k_t).tril(-1).unsqueeze(3) * erase.unsqueeze(-1)
    right = torch.cat([(write * v).unsqueeze(-2), (erase * from_start).unsqueeze(-2) * k_t.unsqueeze(3)], dim=-2)
    solved = torch.linalg.solve_triangular(a, right.mT, upper=False, unitriangular=True).mT  # [N, B, H, R, 1 + R, C]

    # What a chunk does to one row of the state: row <- row @ transfer + added.
    rank = q.shape[-1]
    written = (solved * to_end.unsqueeze(-2)).flatten(3, 4) @ k
    written = written.unflatten(3, (rank, 1 + rank))  # [N, B, H, R, 1 + R, R]
    added = written[..., :1, :]
    transfer = torch.diag_embed(chunk_decay.unsqueeze(-1).expand(written[..., 0, :].shape)) - written[..., 1:, :]
    # One after the other costs least on a CPU; a GPU would wait for N launches, and a symbolic N cannot be unrolled.
    run = _parallel_states if symbolic or q.device.type != "cpu" else _sequential_states
    starts, state = run(transfer, added, state)  # [N, B, H, R, R]

    # Reads: G_{t-1} S0 q_t + sum_s (G_{t-1} / G_s) (q_t . k_s) d_s
    seen = solved @ (decay * (q @ k_t).tril(-1).unsqueeze(3)).mT  # the sum for u and for W, [N, B, H, R, 1 + R, C]
    reads = from_start * (starts @ q.mT) + seen[..., 0, :] - (starts.unsqueeze(-1) * seen[..., 1:, :]).sum(-2)
    reads = reads.permute(1, 0, 4, 2, 3).flatten(1, 2)
    # A slice would ask torch.export to prove that T <= N C.
    reads = reads.index_select(1, torch.arange(tokens, device=q.device)) if symbolic else reads[:, :tokens]
    return reads, state


def _cut(x: Tensor) -> Tensor:
    """[B, T, H, R] -> [B, N, C, H, R]. The padding, a token of zeros, changes nothing: log_keep = erase = write = 0."""
    tokens = x.shape[1]
    chunks = -(-tokens // CHUNK)
    size = -(-tokens // chunks)  # 100 tokens are 4 chunks of 25, not 4 of 32: less padding, and none below CHUNK
    padding = chunks * size - tokens
    x = F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x
    return torch.unflatten(x, 1, (chunks, size))


def _cut_symbolic(x: Tensor) -> Tensor:
    """`_cut` for torch.export, in shapes that hold for every T without a guard: indices past the end meet a zero."""
    tokens = x.shape[1]
    chunks = tokens // CHUNK + 2  # at least two, provably: a size that may be 1 would be specialised
    index = torch.arange(chunks, device=x.device).unsqueeze(1) * CHUNK + torch.arange(CHUNK, device=x.device)
    return F.pad(x, (0, 0, 0, 0, 0, 1))[:, index.clamp(max=tokens)]


def _exp(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    return log_decay.to(dtype).clamp(min=LOG_DECAY_FLOOR).exp()


def _pairwise_decay(before: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """G_{t-1} / G_s for s < t, [.., C] and [.., C] in float64 -> [.., C, C]; entries with s >= t are finite, unused.

    A float32 difference of two long sums has the error of the sums (2e-4 near 3,000); what rounding took from them is
    added back, so the error is relative to the difference. No gradient is missing for that correction, nor for the
    clamp: below the floor it is zero to working precision, and above 0 are only the entries that nothing uses.
    """
    high_t, high_s = before.to(dtype), total.to(dtype)
    log_decay = high_t.unsqueeze(-1) + (-high_s).unsqueeze(-2)
    with torch.no_grad():
        low_t, low_s = (before - high_t).to(dtype), (total - high_s).to(dtype)
        log_decay.add_(low_t.unsqueeze(-1)).sub_(low_s.unsqueeze(-2)).clamp_(LOG_DECAY_FLOOR, 0.0)
    return log_decay.exp_()


def _sequential_states(transfer: Tensor, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states before every chunk, and after the last.

    transfer: [N, B, H, R, R, R]; added: [N, B, H, R, 1, R].
    """
    rank = state.shape[-1]
    row = state.reshape(-1, 1, rank)
    rows = [row]
    for m, b in zip(transfer.flatten(1, 3).unbind(0), added.flatten(1, 3).unbind(0), strict=True):
        row = torch.baddbmm(b, row, m)
        rows.append(row)
    return torch.stack(rows[:-1]).view(-1, *state.shape), row.view(state.shape)


def _parallel_states(transfer: Tensor, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `_sequential_states`, in log2(N) steps: step l composes every map with the one 2**l before it.

    The first map is the constant one, 0 and the initial state. Whatever has it composed in no longer depends on what
    came before, so an index that would fall off the front may stay there, and steps beyond log2(N) change nothing.
    """
    rows = torch.cat([state.unsqueeze(-2).unsqueeze(0), added])
    maps = F.pad(transfer, (0, 0) * (transfer.dim() - 1) + (1, 0))
    here = torch.arange(rows.shape[0], device=rows.device)
    levels = EXPORT_LEVELS if torch.compiler.is_exporting() else (rows.shape[0] - 1).bit_length()
    for level in range(levels):
        earlier = (here - (1 << level)).clamp(min=0)
        rows = rows + rows.index_select(0, earlier) @ maps
        maps = maps.index_select(0, earlier) @ maps
    rows = rows.squeeze(-2)
    return rows[:-1], rows[-1]
