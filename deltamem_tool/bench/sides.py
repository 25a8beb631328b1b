"""A model in a runtime, as the benchmark measures it: tokens in, logits out, and a cache that is passed between calls.

Each side imports its runtime only when it is created, so that the other runtime does not count in its peak memory.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.bench import SEGMENT

if TYPE_CHECKING:
    from deltamem_tool.onnx.contract import Interface

Past = Any  # the cache, with a type of the runtime
Logits = Any  # [B, V] of the last position, as the runtime returns them


@dataclass(frozen=True)
class GraphFolder:
    """The folder and the interface of an ONNX graph."""

    folder: Path
    interface: Interface


class Side(Protocol):
    """A model in a runtime."""

    def call(self, ids: NDArray[Any], past: Past = None) -> tuple[Logits, Past]:
        """Feed tokens, int64 `[B, T]`, after `past` or to a new conversation. Return when all work has finished.

        `past` may be changed in place.
        """

    def choose(self, logits: Logits) -> NDArray[Any]:
        """Return the most likely tokens, int64 `[B, 1]`."""


class TorchSide:
    """A model in eager PyTorch, with a `MemoryCache` if it has a memory, or else a `DynamicCache`."""

    def __init__(self, model: Any) -> None:
        from deltamem_tool._compat import cache_argument
        from deltamem_tool.memory.attachment import find_attachment, hf_model

        self._model = model
        base = hf_model(model)
        self._argument = cache_argument(base.forward)
        self._keeps_last = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._has_memory = find_attachment(base) is not None
        self._config = base.config

    def cache(self) -> Any:
        """Return the cache of a new conversation."""
        from transformers import DynamicCache

        from deltamem_tool.memory.cache import MemoryCache

        return MemoryCache(self._model) if self._has_memory else DynamicCache(config=self._config)

    def call(self, ids: NDArray[Any], past: Past = None) -> tuple[Logits, Past]:
        """Feed tokens; see `Side.call`."""
        import torch

        device = self._model.device
        tokens = torch.from_numpy(ids).to(device)
        if past is None:
            past = self.cache()
            if self._has_memory and self._is_segmented:
                past.segment_tags = torch.from_numpy(_tags(ids)).to(device)
        options = {"logits_to_keep": 1} if self._keeps_last else {}
        with torch.no_grad():
            logits = self._model(input_ids=tokens, use_cache=True, **{self._argument: past}, **options).logits[:, -1]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return logits, past

    def choose(self, logits: Logits) -> NDArray[Any]:
        """Return the likeliest tokens; see `Side.choose`."""
        return np.asarray(logits.argmax(-1, keepdim=True).cpu())

    @property
    def _is_segmented(self) -> bool:
        from deltamem_tool.memory.attach import adapter_of

        return adapter_of(self._model).config.granularity != "token"


def _tags(ids: NDArray[Any]) -> NDArray[Any]:
    """Return segment tags of a prompt for `MemoryCache.segment_tags`, int8 `[B, T]`."""
    from deltamem_tool.segments.tags import SegmentTag

    return np.where(_ends(ids), SegmentTag.LAST, SegmentTag.INSIDE).astype(np.int8)


def _ends(ids: NDArray[Any]) -> NDArray[Any]:
    """Return the tokens that end a segment, bool `[B, T]`. Decoded tokens join the last segment, which stays open."""
    row = np.arange(1, ids.shape[1] + 1) % SEGMENT == 0
    return np.broadcast_to(row, ids.shape)


class OnnxSide:
    """A graph in ONNX Runtime, without PyTorch."""

    def __init__(self, graph: GraphFolder, provider: str, threads: int | None, cuda_graph: bool = False) -> None:
        from deltamem_tool.onnx.runtime.buffered_graph import open_graph

        self._graph: Any = open_graph(graph.folder, graph.interface, provider, threads, cuda_graph=cuda_graph)
        self._is_segmented = graph.interface.segment > 0

    def call(self, ids: NDArray[Any], past: Past = None) -> tuple[Logits, Past]:
        """Feed tokens; see `Side.call`."""
        first = past is None
        carried, columns = (self._graph.empty_past(len(ids)), 0) if first else past
        columns += ids.shape[1]
        ends = None
        if self._is_segmented:
            ends = _ends(ids) if first else np.zeros(ids.shape, bool)
        mask, writes = np.ones((len(ids), columns), np.int64), np.ones(ids.shape, bool)
        logits, carried = self._graph.step(ids, mask, writes, carried, ends)
        return logits[:, -1], (carried, columns)

    def choose(self, logits: Logits) -> NDArray[Any]:
        """Return the likeliest tokens; see `Side.choose`."""
        return np.asarray(logits.argmax(-1)[:, None], np.int64)
