"""The memory of a batch of conversations, as an immutable value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from deltamem_tool.errors import MemoryStateError
from deltamem_tool.memory.file import MemoryShape, StoredMemory, check_memory, read_memory, write_memory


class MemoryState:
    """The memory of a batch of conversations: the states of all layers.

    A memory is never changed in place: every method returns a new one.

    Args:
        layers: states, float32 `[B, H, R, R]` by decoder layer index; the last two axes are value row and key column.
        adapter: fingerprint of the adapter that the states belong to.
        open_segments: for an adapter that writes by segments, float32 `[B, W]` by layer: the sums over the tokens of
            the open segment, then their number. W is `DeltaMemConfig.segment_width`. Empty if every token writes.

    Raises:
        MemoryStateError: a tensor does not have that dtype or shape, or the layers have different batch sizes.

    Example:
        >>> import torch
        >>> import deltamem_tool as deltamem
        >>> model = deltamem.load("builtin:adapter")
        >>> cache = deltamem.MemoryCache(model)
        >>> _ = model(torch.tensor([[7, 8, 9]]), cache=cache)
        >>> cache.memory.save("me.safetensors")
        >>> deltamem.MemoryState.load("me.safetensors").batch_size
        1
    """

    def __init__(
        self, layers: Mapping[int, Tensor], adapter: str, open_segments: Mapping[int, Tensor] | None = None
    ) -> None:
        self.layers = dict(layers)
        self.open_segments = dict(open_segments or {})
        self.adapter = adapter
        for layer, state in self.layers.items():
            if state.ndim != 4 or state.shape[2] != state.shape[3] or state.dtype != torch.float32:
                raise _invalid_tensor_error(f"state of layer {layer}", state, "[B, H, R, R]")
        for layer, segment in self.open_segments.items():
            if segment.ndim != 2 or segment.dtype != torch.float32:
                raise _invalid_tensor_error(f"open segment of layer {layer}", segment, "[B, W]")
        tensors = [*self.layers.values(), *self.open_segments.values()]
        fits = all(tensor.shape[0] == tensors[0].shape[0] for tensor in tensors)
        if not self.layers or not fits or (self.open_segments and self.open_segments.keys() != self.layers.keys()):
            raise MemoryStateError(
                "The layers of this memory do not belong together.",
                "They have different batch sizes, or some have an open segment and some do not.",
                "Pass the layers of one batch.",
            )

    def __repr__(self) -> str:
        _, heads, rank, _ = next(iter(self.layers.values())).shape
        return f"MemoryState(batch={self.batch_size}, layers={len(self.layers)}, heads={heads}, rank={rank})"

    @property
    def batch_size(self) -> int:
        """B, the number of conversations."""
        return next(iter(self.layers.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Total size of all tensors, in bytes."""
        return sum(tensor.nbytes for tensor in (*self.layers.values(), *self.open_segments.values()))

    @property
    def shape(self) -> MemoryShape:
        """Shape of the memory: `(H, R, R)` by layer, and W."""
        segment = next((segment.shape[1] for segment in self.open_segments.values()), 0)
        return MemoryShape({layer: tuple(state.shape[1:]) for layer, state in self.layers.items()}, segment)

    @property
    def open_tokens(self) -> Tensor:
        """Number of tokens in the open segment of each conversation, int64 `[B]`."""
        if not self.open_segments:
            return torch.zeros(self.batch_size, dtype=torch.int64)
        return next(iter(self.open_segments.values()))[:, -1].long()

    def norms(self) -> dict[int, Tensor]:
        """Return the Frobenius norm of every state, `[B, H]` by layer."""
        return {layer: state.flatten(2).norm(dim=2) for layer, state in self.layers.items()}

    def clone(self) -> MemoryState:
        """Return an independent copy, detached from autograd."""
        return self._map(lambda tensor: tensor.detach().clone())

    def fork(self, copies: int) -> MemoryState:
        """Repeat every row `copies` times, to `[B·copies, H, R, R]`; the copies of a row are adjacent."""
        return self._map(lambda tensor: tensor.repeat_interleave(copies, dim=0))

    def select(self, rows: Tensor | Sequence[int]) -> MemoryState:
        """Select rows in the given order; rows can be repeated."""
        return self._map(lambda tensor: tensor.index_select(0, torch.as_tensor(rows, device=tensor.device)))

    @classmethod
    def stack(cls, memories: Sequence[MemoryState]) -> MemoryState:
        """Concatenate all rows of `memories` into one batch, in order, on the devices of the first.

        Raises:
            MemoryStateError: `memories` is empty, or they belong to different adapters.
        """
        if not memories:
            raise MemoryStateError("There are no memories to stack.", "", "Pass one or more.")
        first = memories[0]
        for memory in memories[1:]:
            check_memory(memory.shape, memory.adapter, first.shape, first.adapter)
        layers, segments = (
            {layer: torch.cat([part[layer].to(tensor.device) for part in parts]) for layer, tensor in parts[0].items()}
            for parts in ([memory.layers for memory in memories], [memory.open_segments for memory in memories])
        )
        return cls(layers, first.adapter, segments)

    def to(self, device: torch.device | str) -> MemoryState:
        """Move all layers to one device."""
        if all(state.device == torch.device(device) for state in self.layers.values()):
            return self
        return self._map(lambda tensor: tensor.to(device))

    def layer_on(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return state and open segment of one layer, on a device; the segment is None if every token writes."""
        segment = self.open_segments.get(layer)
        return self.layers[layer].to(device), None if segment is None else segment.to(device)

    def for_autograd(self) -> MemoryState:
        """Return this memory, or a copy if gradients are enabled and it was written in `torch.inference_mode()`."""
        if torch.is_grad_enabled() and any(state.is_inference() for state in self.layers.values()):
            return self._map(torch.clone)
        return self

    def check_finite(self) -> None:
        """Check that all values are finite.

        Raises:
            MemoryStateError: a state contains NaN or infinity.
        """
        for layer in self.layers:
            tensors = [part[layer] for part in (self.layers, self.open_segments) if part]
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                raise MemoryStateError(
                    f"The memory of layer {layer} contains NaN or infinity.", "", "Start from an earlier one."
                )

    def save(self, path: str | Path) -> None:
        """Write the memory to a safetensors file, whole or not at all. `load` returns the same bits.

        Raises:
            MemoryStateError: the memory contains NaN or infinity.
        """
        states, segments = (
            {layer: tensor.detach().cpu().numpy() for layer, tensor in part.items()}
            for part in (self.layers, self.open_segments)
        )
        write_memory(path, StoredMemory(states, segments, self.adapter))

    @classmethod
    def load(cls, path: str | Path) -> MemoryState:
        """Read a memory file.

        Raises:
            MemoryStateError: the file is missing or damaged, or has a newer format.
        """
        stored = read_memory(path)
        states, segments = (
            {layer: torch.from_numpy(array) for layer, array in part.items()}
            for part in (stored.states, stored.open_segments)
        )
        return cls(states, stored.adapter, segments)

    def _map(self, change: Callable[[Tensor], Tensor]) -> MemoryState:
        layers, segments = (
            {layer: change(tensor) for layer, tensor in part.items()} for part in (self.layers, self.open_segments)
        )
        return MemoryState(layers, self.adapter, segments)


def _invalid_tensor_error(name: str, tensor: Tensor, expected: str) -> MemoryStateError:
    return MemoryStateError(
        f"Invalid tensor for the {name}.",
        f"It is {tensor.dtype} {list(tensor.shape)}, not float32 {expected}.",
        "Pass the tensors of a MemoryCache's memory.",
    )
