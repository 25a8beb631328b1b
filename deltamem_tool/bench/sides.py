"""A model in a runtime, as it is measured: prompts go in, logits come out, and what it carries goes on.

Each side imports its own runtime when it is made: the other's would count in the memory that its process takes.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.bench import SEGMENT

if TYPE_CHECKING:
    from deltamem_tool.onnx.contract import Interface

Past = Any  # what a side carries from call to call
Logits = Any  # [B, V] of the last position, where the runtime gives them


class Side(Protocol):
    def call(self, ids: NDArray, past: Past = None) -> tuple[Logits, Past]:
        """Feed tokens, int64 `[B, T]`, after `past`, or as the first of a conversation. It has finished when it comes
        back. `past` may be changed."""

    def choose(self, logits: Logits) -> NDArray:
        """The likeliest tokens, int64 `[B, 1]`."""


class TorchSide:
    """A model in PyTorch, eager, with the cache that it has by itself: a memory's, where it has a memory."""

    def __init__(self, model: Any) -> None:
        from deltamem_tool._compat import cache_argument
        from deltamem_tool.memory.attached import PATCH, hf_model

        self._model = model
        base = hf_model(model)
        self._argument = cache_argument(base.forward)
        self._cuts = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._patched = hasattr(base, PATCH)
        self._config = base.config

    def cache(self) -> Any:
        """Of a conversation that begins."""
        from transformers import DynamicCache

        from deltamem_tool.memory.cache import MemoryCache

        return MemoryCache(self._model) if self._patched else DynamicCache(config=self._config)

    def call(self, ids: NDArray, past: Past = None) -> tuple[Logits, Past]:
        import torch

        device = self._model.device
        tokens = torch.from_numpy(ids).to(device)
        if past is None:
            past = self.cache()
            if self._patched and self._segmented:
                past.segment_tags = torch.from_numpy(_tags(ids)).to(device)
        kept = {"logits_to_keep": 1} if self._cuts else {}
        with torch.no_grad():
            logits = self._model(input_ids=tokens, use_cache=True, **{self._argument: past}, **kept).logits[:, -1]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return logits, past

    def choose(self, logits: Logits) -> NDArray:
        return logits.argmax(-1, keepdim=True).cpu().numpy()

    @property
    def _segmented(self) -> bool:
        from deltamem_tool.memory.attach import adapter_of

        return adapter_of(self._model).config.granularity != "token"


def _tags(ids: NDArray) -> NDArray:
    """Which segment each token of a prompt belongs to, as `MemoryCache.segment_tags` takes it, int8 `[B, T]`."""
    from deltamem_tool.segments.tags import SegmentTag

    return np.where(_ends(ids), SegmentTag.LAST, SegmentTag.INSIDE).astype(np.int8)


def _ends(ids: NDArray) -> NDArray:
    """Tokens that end a segment, bool `[B, T]`: what is decoded joins the last one, which stays open."""
    row = np.arange(1, ids.shape[1] + 1) % SEGMENT == 0
    return np.broadcast_to(row, ids.shape)


class OnnxSide:
    """A graph in ONNX Runtime. It does not need PyTorch."""

    def __init__(self, folder: Path, interface: Interface, provider: str, threads: int | None) -> None:
        from deltamem_tool.onnx.runtime.static_graph import open_graph

        self._graph: Any = open_graph(folder, interface, provider, threads)
        self._segmented = interface.segment > 0

    def call(self, ids: NDArray, past: Past = None) -> tuple[Logits, Past]:
        first = past is None
        carried, columns = (self._graph.empty_past(len(ids)), 0) if first else past
        columns += ids.shape[1]
        ends = None
        if self._segmented:
            ends = _ends(ids) if first else np.zeros(ids.shape, bool)
        mask, writes = np.ones((len(ids), columns), np.int64), np.ones(ids.shape, bool)
        logits, carried = self._graph.step(ids, mask, writes, carried, ends)
        return logits[:, -1], (carried, columns)

    def choose(self, logits: Logits) -> NDArray:
        return logits.argmax(-1)[:, None].astype(np.int64)
