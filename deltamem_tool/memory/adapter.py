"""The adapter: the modules of all layers with a memory, which are trained and saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import local
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltamem_tool._compat import changes_of, parameters_of
from deltamem_tool.base_model.attention import AttentionLayer
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import ArchitectureError, ConfigError
from deltamem_tool.memory.file import MemoryShape
from deltamem_tool.memory.layer import DeltaMemLayer
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.memory.weights import fingerprint_of

IN_TRAINING = "in training"  # stands for a fingerprint
_THREAD = local()  # the adapter that each thread trains, as `trained`


class DeltaMemAdapter(nn.Module):
    """The modules of all layers with a memory: everything that is trained and saved.

    The weights are float32. You can cast the adapter to another dtype, which rounds its weights. The memory is still
    computed in float32, and a saved adapter is float32 again.

    The parameters are not registered in the base model, so the state dict of the base model does not change.
    """

    @torch.inference_mode(False)  # where it is on, nothing that is made could be trained or would count its changes
    def __init__(self, config: DeltaMemConfig, layers: Iterable[AttentionLayer]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict()
        for layer in layers:
            if config.rank > layer.hidden_size:
                raise ConfigError(
                    f"The rank {config.rank} is too large.",
                    f"It is larger than the model's hidden size, {layer.hidden_size}.",
                    "Choose a smaller rank; 8 is the paper's.",
                )
            widths = {branch: layer.projection(branch).out_features for branch in config.branches}
            self.layers[str(layer.index)] = DeltaMemLayer(config, layer.hidden_size, widths)
        # What one conversation's memory measures.
        self.memory_shape = MemoryShape({i: config.state_shape for i in self.layer_indices}, config.segment_width)
        self.made_for: object | None = None  # the `adapter.BaseModel` of the folder that it was loaded from
        # The modules that have weights: to look for them at every call would take too long.
        self._leaves = [module for module in self.modules() if parameters_of([module])]
        # Of each layer, what says where it is: an exporter puts others in the layers' place.
        self._queries = {int(index): cast(DeltaMemLayer, layer).query for index, layer in self.layers.items()}
        # Computed of which changes, and of which data: as long as it is here, no other can be in its place.
        self._fingerprint: tuple[str, list[tuple[int, int]] | None, list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy, whose weights get a new count of changes."""
        return self.__dict__ | {"_fingerprint": None}

    @property
    def layer_indices(self) -> list[int]:
        """Indices of the decoder layers that have a memory."""
        return [int(index) for index in self.layers]

    def layer(self, index: int) -> DeltaMemLayer:
        """Return the module of decoder layer `index`."""
        return cast(DeltaMemLayer, self.layers[str(index)])

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not type it; a fingerprint cannot be taken while a graph is traced
    def empty_memory(self, batch_size: int) -> MemoryState:
        """Return a memory of zeros for `batch_size` conversations, each layer's on the device of its weights."""
        shape = self.memory_shape
        zeros = partial(torch.zeros, dtype=torch.float32)
        states = {i: zeros(batch_size, *size, device=self.device_of(i)) for i, size in shape.layers.items()}
        segments = {
            i: zeros(batch_size, shape.segment_width, device=self.device_of(i)) for i in states if shape.segment_width
        }
        return MemoryState(states, self.fingerprint, segments)

    def device_of(self, index: int) -> torch.device:
        """Return the device of the weights of decoder layer `index`."""
        return self._queries[index].weight.device

    def layer_on(self, index: int, device: torch.device) -> DeltaMemLayer:
        """Return the module of decoder layer `index`, moved to `device` if it is elsewhere."""
        layer = self.layer(index)
        if self.device_of(index) != device:
            with torch.inference_mode(False):
                layer.to(device)
        return layer

    def extra_repr(self) -> str:
        """Return the line that `print(adapter)` begins with."""
        config, layers = self.config, self.layer_indices
        size = f"rank={config.rank}, heads={config.state_heads}, branches={''.join(config.branches)}"
        return f"{size}, {len(layers)} layers from {min(layers)} to {max(layers)}, {self.num_parameters():,} parameters"

    def num_parameters(self) -> int:
        """Return the number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def fingerprint(self) -> str:
        """The fingerprint that memories are bound to: see `fingerprint_of`. It is computed again after a change.

        Raises:
            ArchitectureError: accelerate has offloaded the adapter with the base model.
        """
        if getattr(_THREAD, "trained", None) is self:
            return IN_TRAINING
        parameters = parameters_of(self._leaves)
        changes = changes_of(parameters)
        if self._fingerprint is not None and self._fingerprint[1] == changes:
            return self._fingerprint[0]
        self.check_materialized()
        fingerprint = fingerprint_of(
            self.config, {name: w.cpu().float().numpy() for name, w in self.state_dict().items()}
        )
        data = [parameter.detach() for parameter in parameters]
        counted = changes is not None and not any(parameter.is_inference() for parameter in parameters)
        self._fingerprint = (fingerprint, changes, data) if counted else None
        return fingerprint

    def check_materialized(self) -> None:
        """Check that the weights are in memory.

        Raises:
            ArchitectureError: accelerate has offloaded the adapter with the base model.
        """
        if any(parameter.is_meta for parameter in parameters_of(self._leaves)):
            raise ArchitectureError(
                "The adapter was offloaded with the base model.",
                "It is registered as a part of the model, so accelerate keeps its weights elsewhere between calls.",
                "Offload the model before you attach or load the adapter, or leave out register=True.",
            )

    @contextmanager
    def in_training(self) -> Iterator[None]:
        """Bind memories to a constant instead of the weights, inside the block and in this thread.

        The weights change with every step, hashing those of a 4B model's adapter took 0.15 s, and the memories of a
        training step are not kept.
        """
        before, _THREAD.trained = getattr(_THREAD, "trained", None), self
        try:
            yield
        finally:
            _THREAD.trained = before
