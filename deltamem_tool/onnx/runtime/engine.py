"""The engine that runs conversations with an ONNX folder, in ONNX Runtime and without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from deltamem_tool.chat.engine import Past, check_ids
from deltamem_tool.chat.group import Group, PaddedGroup
from deltamem_tool.chat.text import ChatText, read_json
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import ConfigError, ExportError
from deltamem_tool.memory.file import MemoryShape, StoredMemory
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.locate import find_onnx
from deltamem_tool.onnx.manifest import Manifest
from deltamem_tool.onnx.runtime.buffered_graph import open_graph
from deltamem_tool.onnx.runtime.slots import Slots


class OnnxModel:
    """A model in an ONNX folder that runs in ONNX Runtime: pass it to `Conversation`.

    One instance serves many conversations and threads.

    Args:
        folder: a folder written by `deltamem export`, a folder that has one under `onnx/`, or a Hub id.
        provider: execution provider, "cpu" or "cuda".
        threads: threads per call; by default `ORT_INTRA_OP_NUM_THREADS`, `OMP_NUM_THREADS`, or the number of cores
            that this process may use.
        map_weights: memory-map the weights, which must not be quantised: see `LoadedGraph`.
        cuda_graph: record decode steps as CUDA graphs and replay them. This needs a graph of fixed length on CUDA, and
            all calls must come from one thread: see `BufferedGraph`.

    Raises:
        ExportError: a file is missing or damaged, the files do not match, or the provider is not available.
        ConfigError: `map_weights` is set, but the weights are quantised.
        HubError: the folder cannot be fetched from the Hub.

    Example:
        >>> import deltamem_tool as deltamem
        >>> from transformers import AutoTokenizer
        >>> model = deltamem.load("builtin:adapter")
        >>> tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        >>> _ = deltamem.export_onnx(model, tokenizer, "my-onnx")
        >>> talk = deltamem.Conversation(deltamem.OnnxModel("my-onnx"))
        >>> len(talk.generate("My dog is Rex.").text) > 0
        True
    """

    def __init__(
        self,
        folder: str | Path,
        provider: str = "cpu",
        threads: int | None = None,
        map_weights: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        self.folder = find_onnx(folder)
        self.manifest = Manifest.read(self.folder)
        interface = self.manifest.interface
        if interface.genai:
            raise ExportError(
                f"{folder} is for onnxruntime-genai.",
                "Its graph writes every token that it reads, and starts conversations by itself.",
                "Run it with onnxruntime-genai (docs/export.md), or export for the target cpu.",
            )
        if map_weights and self.manifest.quantize != "none":
            raise ConfigError(
                f"{folder} is quantised, so its weights cannot be memory-mapped.",
                "A token takes dozens of times as long if ONNX Runtime cannot pack weights of 4 or 8 bits.",
                "Leave out --map-weights (map_weights).",
            )
        self.text = ChatText.from_folder(self.folder)
        self.stop_tokens = self.text.stop_tokens(_configured_ends(self.folder))
        self.adapter = self.manifest.adapter
        self.mechanism = DeltaMemConfig.from_dict(self.manifest.mechanism)
        _check_mechanism(self.mechanism, interface)
        self.memory_shape = MemoryShape(dict(interface.state_shapes), interface.segment)
        self.max_length = interface.room
        self.takes_back = not interface.base_states
        self.graph: Any = open_graph(self.folder, interface, provider, threads, map_weights, cuda_graph)

    def start(self, memory: StoredMemory) -> Past:
        """See `Engine.start`."""
        batch = len(next(iter(memory.states.values())))
        return self.graph.empty_past(batch, memory.states, memory.open_segments)

    def step(
        self,
        past: Past,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        write_mask: NDArray[Any],
        segment_end: NDArray[Any] | None = None,
        all_positions: bool = False,
    ) -> tuple[NDArray[Any], Past]:
        """See `Engine.step`."""
        if all_positions and self.manifest.interface.logits != "all":
            raise ExportError(
                f"{self.folder} has no logits of every position.",
                "It was exported with the logits of the last position only.",
                "Export the adapter again with --logits all.",
            )
        check_ids(self.text, input_ids, self.manifest.interface.vocab_size)
        logits, past = self.graph.step(input_ids, attention_mask, write_mask, past, segment_end)
        return (logits if all_positions else logits[:, -1]), past

    def memory(self, past: Past) -> StoredMemory:
        """See `Engine.memory`."""
        return StoredMemory(self.graph.states(past), self.graph.segments(past), self.adapter)

    def with_memory(self, past: Past, memory: StoredMemory) -> Past:
        """See `Engine.with_memory`."""
        return self.graph.with_memory(past, memory.states, memory.open_segments)

    def take(self, past: Past, row: int, columns: NDArray[Any]) -> Past:
        """See `Engine.take`."""
        return self.graph.take(past, row, columns)

    def keep(self, past: Past, columns: Mapping[int, NDArray[Any]]) -> Past:
        """See `Engine.keep`."""
        return self.join([self.take(past, row, of_row) for row, of_row in columns.items()])

    def join(self, pasts: Sequence[Past]) -> Past:
        """See `Engine.join`."""
        return self.graph.join(pasts)

    def size(self, past: Past) -> int:
        """See `Engine.size`."""
        return int(self.graph.size(past))

    def group(self) -> Group:
        """See `Engine.group`."""
        return Slots(self.graph, self.adapter) if Slots.fit(self.graph) else PaddedGroup(self)


def _configured_ends(folder: Path) -> list[int]:
    """Return the ids in generation_config.json, which has one, a list, or none."""
    ids = read_json(folder / contract.GENERATION_CONFIG_FILE).get("eos_token_id")
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(token) is int for token in listed):
        raise ExportError(
            f"{contract.GENERATION_CONFIG_FILE} of this ONNX folder cannot be read.",
            "Its eos_token_id is neither a token id nor a list of token ids.",
            "Export the model again.",
        )
    return listed


def _check_mechanism(mechanism: DeltaMemConfig, interface: Interface) -> None:
    """Check that the graph's memory matches the mechanism in the manifest.

    Raises:
        ExportError: they do not match.
    """
    shapes = set(interface.state_shapes.values())
    if shapes != {mechanism.state_shape} or interface.segment != mechanism.segment_width:
        raise ExportError(
            f"{contract.MANIFEST_FILE} is inconsistent.",
            "The memory that it describes does not match the inputs of the graph.",
            "Export the model again.",
        )
