"""The memories of all layers as one module: what is trained and saved, and what a memory is bound to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import local
from typing import cast

import torch
from torch import nn

from deltamem_tool._compat import changes_of
from deltamem_tool.base_model.attention import AttentionLayer
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import ConfigError
from deltamem_tool.memory.file import MemoryShape
from deltamem_tool.memory.fingerprint import fingerprint_of
from deltamem_tool.memory.layer import DeltaMemory
from deltamem_tool.memory.state import MemoryState

IN_TRAINING = "in training"  # stands for a fingerprint
_THREAD = local()  # the adapter that each thread trains, as `trained`


class DeltaMemAdapter(nn.Module):
    """The memories of all layers: everything that is trained and saved.

    Its parameters are not registered in the base model, so the base's state dict stays its own.
    """

    def __init__(self, config: DeltaMemConfig, layers: Iterable[AttentionLayer]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict()
        for layer in layers:
            if config.rank > layer.hidden_size:
                raise ConfigError(
                    f"The rank {config.rank} is too large.",
                    f"It exceeds the model's hidden size, {layer.hidden_size}.",
                    "Choose a smaller rank; 8 is the paper's.",
                )
            widths = {branch: layer.projection(branch).out_features for branch in config.branches}
            self.layers[str(layer.index)] = DeltaMemory(config, layer.hidden_size, widths)
        # What one conversation's memory measures.
        self.memory_shape = MemoryShape({i: config.state_shape for i in self.layer_indices}, config.segment_width)
        self.made_for: object | None = None  # the `adapter.BaseModel` of the folder that it was loaded from
        self._weights = tuple(self.parameters())  # to walk the modules at every call would take too long
        self._fingerprint: tuple[tuple[int, ...], str] | None = None

    @property
    def layer_indices(self) -> list[int]:
        return [int(index) for index in self.layers]

    def memory(self, layer: int) -> DeltaMemory:
        return cast(DeltaMemory, self.layers[str(layer)])

    @torch.compiler.disable  # a fingerprint cannot be taken while a graph is traced
    def empty_memory(self, batch_size: int) -> MemoryState:
        """Zeros for `batch_size` conversations, on the adapter's device."""
        shape = self.memory_shape
        states = {i: torch.zeros(batch_size, *of_layer, device=self.device) for i, of_layer in shape.layers.items()}
        segments = {
            i: torch.zeros(batch_size, shape.segment_width, device=self.device) for i in states if shape.segment_width
        }
        return MemoryState(states, self.fingerprint, segments)

    @property
    def device(self) -> torch.device:
        return self._weights[0].device

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def fingerprint(self) -> str:
        """What a memory is bound to: see `fingerprint_of`. Computed anew after a change."""
        if getattr(_THREAD, "trained", None) is self:
            return IN_TRAINING
        versions = tuple(changes_of(weight) for weight in self._weights)
        if self._fingerprint is None or self._fingerprint[0] != versions:
            weights = {name: weight.cpu().float().numpy() for name, weight in self.state_dict().items()}
            self._fingerprint = (versions, fingerprint_of(self.config, weights))
        return self._fingerprint[1]

    @contextmanager
    def in_training(self) -> Iterator[None]:
        """Inside, and in this thread, memories are bound to a word and not to the weights, which change with every
        step: hashing those took 0.15 s for a 4B model's, and nobody keeps the memories of a training step."""
        before, _THREAD.trained = getattr(_THREAD, "trained", None), self
        try:
            yield
        finally:
            _THREAD.trained = before
