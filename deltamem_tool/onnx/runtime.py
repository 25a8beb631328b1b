"""Run an ONNX folder: conversations with a memory, with ONNX Runtime and without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from deltamem_tool.errors import ConfigError, ExportError, MemoryStateError
from deltamem_tool.memory_file import MemoryShape, StoredMemory, check_memory, read_memory, write_memory
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface, Manifest
from deltamem_tool.onnx.text import ChatText, Message, TextStream, read_json

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

Past = dict[str, NDArray]  # KV cache and states, by input name
_TYPES = {
    "tensor(int64)": contract.INT64,
    "tensor(bool)": contract.BOOL,
    "tensor(float)": contract.FLOAT32,
    "tensor(float16)": contract.FLOAT16,
    "tensor(bfloat16)": contract.BFLOAT16,
}
_ANSWER = "\ue000{}\ue000"  # stands for an answer in rendered text; private-use characters, so no template trims it


@dataclass(frozen=True)
class Answer:
    """What one call of `Conversation.generate` said."""

    text: str
    tokens: tuple[int, ...]  # as generated, a stop token included
    stopped: bool  # by a stop token; otherwise max_new_tokens ran out


class Graph:
    """`model.onnx` in a session, checked against its interface.

    Args:
        folder: where the graph and its weights are.
        interface: what the graph must take and give.
        providers: ONNX Runtime's execution providers, the first one wanted; the CPU's alone by default.

    Raises:
        ExportError: the graph cannot be loaded, is not what `interface` says, or a provider is not to be had.
    """

    def __init__(self, folder: str | Path, interface: Interface, providers: Sequence[str] | None = None) -> None:
        self.interface = interface
        wanted = list(providers or [CPU])
        for name in wanted:
            available = onnxruntime.get_available_providers()
            if name not in available:
                raise _no_provider(name, f"This build has {', '.join(available)}.", "Choose one of these.")
        try:
            self._session = onnxruntime.InferenceSession(str(Path(folder) / contract.MODEL_FILE), providers=wanted)
        except Exception as error:  # onnxruntime's exceptions have no common base class of their own
            why = str(error).splitlines()[0]
            raise ExportError("ONNX Runtime cannot load this graph.", f"{why}.", "Export the model again.") from error
        for name in wanted:
            if name not in self._session.get_providers():  # ONNX Runtime said so on stderr, and went on without it
                why = "Its device or a library that it needs is missing; ONNX Runtime's own message says which."
                raise _no_provider(name, why, f"Install what is missing, or run on {CPU}.")
        self._session.disable_fallback()
        interface.check_graph(_described(self._session.get_inputs()), _described(self._session.get_outputs()))
        self._outputs = list(interface.outputs())

    def empty_past(self, batch: int, states: Mapping[int, NDArray] | None = None) -> Past:
        """No tokens yet; the given states `[B, H, R, R]` by layer, or zeros."""
        past: Past = {}
        dtype = np.dtype(self.interface.dtype)
        for i, layer in enumerate(self.interface.layers):
            for part, (heads, width) in layer.cache.items():
                past[contract.carried_name(contract.PAST, i, part)] = np.zeros((batch, heads, 0, width), dtype)
            if layer.state is not None:
                state = np.zeros((batch, *layer.state), np.float32) if states is None else states[i]
                past[contract.carried_name(contract.PAST, i, contract.STATE)] = state
                if self.interface.segment:
                    segment = np.zeros((batch, self.interface.segment), np.float32)
                    past[contract.carried_name(contract.PAST, i, contract.SEGMENT)] = segment
        return past

    def states(self, past: Past) -> dict[int, NDArray]:
        """The memory in `past`: float32 `[B, H, R, R]` by layer."""
        return {i: past[contract.carried_name(contract.PAST, i, contract.STATE)] for i in self.interface.state_shapes}

    def segments(self, past: Past) -> dict[int, NDArray]:
        """The open segments in `past`: float32 `[B, W]` by layer; empty where every token writes."""
        layers = self.interface.state_shapes if self.interface.segment else ()
        return {i: past[contract.carried_name(contract.PAST, i, contract.SEGMENT)] for i in layers}

    def step(
        self,
        input_ids: NDArray,
        attention_mask: NDArray,
        write_mask: NDArray,
        past: Past,
        segment_end: NDArray | None = None,
    ) -> tuple[NDArray, Past]:
        """One call of the graph; `past` is not changed.

        Args:
            input_ids: int64 `[B, T]`.
            attention_mask: int64 `[B, P + T]`, 0 at padding.
            write_mask: bool `[B, T]`, which tokens write; padding never does.
            past: from `empty_past` or the call before.
            segment_end: bool `[B, T]`, which tokens end a segment, where the graph has segments.

        Returns:
            Logits `[B, 1, V]` (`[B, T, V]` in a graph for all positions) and the next past.
        """
        feed = {
            contract.INPUT_IDS: input_ids,
            contract.ATTENTION_MASK: attention_mask,
            contract.WRITE_MASK: write_mask,
            **({} if segment_end is None else {contract.SEGMENT_END: segment_end}),
            **past,
        }
        logits, *present = self._session.run(self._outputs, feed)
        names = map(contract.past_name, self._outputs[1:])
        return logits, dict(zip(names, present, strict=True))


class OnnxModel:
    """An ONNX folder, ready to talk. One model serves many conversations.

    Args:
        folder: what `deltamem export` wrote.
        providers: ONNX Runtime's execution providers, the first one wanted; the CPU's alone by default.

    Raises:
        ExportError: a file is missing or damaged, files disagree, or a provider is not to be had.
    """

    def __init__(self, folder: str | Path, providers: Sequence[str] | None = None) -> None:
        self.folder = contract.check_folder(folder)
        self.manifest = Manifest.from_json((self.folder / contract.MANIFEST_FILE).read_text(encoding="utf-8"))
        self.graph = Graph(self.folder, self.manifest.interface, providers)
        self.step = self.graph.step
        self.text = ChatText(self.folder)
        self.stop_tokens = _stop_tokens(self.folder)

    def start(self, memory: Mapping[int, NDArray] | None = None, write: bool = True) -> Conversation:
        """A new conversation.

        Args:
            memory: states `[1, H, R, R]` by layer, as `load_memory` or another conversation's `memory` gives them;
                zeros by default.
            write: whether its tokens write.

        Raises:
            MemoryStateError: `memory` does not fit.
        """
        if memory is not None:
            self._check_memory(StoredMemory(dict(memory), {}, self.manifest.adapter))
            rows = {state.shape[0] for state in memory.values()}
            if rows != {1}:
                raise MemoryStateError(
                    "A conversation starts from one memory.", f"This one holds {max(rows)} rows.", "Pick one row."
                )
        return Conversation(self, memory, write)

    def load_memory(self, path: str | Path) -> dict[int, NDArray]:
        """The states of a memory file, `[B, H, R, R]` by layer.

        Raises:
            MemoryStateError: the file is missing or damaged, or belongs to another adapter.
        """
        stored = read_memory(path)
        self._check_memory(stored)
        return stored.states

    def _check_memory(self, memory: StoredMemory) -> None:
        expected = MemoryShape(dict(self.manifest.interface.state_shapes))
        check_memory(memory.shape, memory.adapter, expected, self.manifest.adapter)


class Conversation:
    """Turns of one conversation, its KV cache and its memory. Made by `OnnxModel.start`."""

    def __init__(self, model: OnnxModel, memory: Mapping[int, NDArray] | None, write: bool) -> None:
        self._model = model
        self._write = write
        self._past = model.graph.empty_past(1, memory)
        self._fed = 0  # tokens in the KV cache
        self._pending: list[int] = []  # the last generated token, where no other was asked for after it
        self._messages: list[Message] = []
        self._rendered = ""  # all text so far, answers replaced by their placeholders

    @property
    def memory(self) -> dict[int, NDArray]:
        """The states, float32 `[1, H, R, R]` by layer."""
        return self._model.graph.states(self._past)

    def save_memory(self, path: str | Path) -> None:
        """Write a memory file that PyTorch and ONNX Runtime both load."""
        write_memory(path, StoredMemory(self.memory, {}, self._model.manifest.adapter))

    def generate(
        self,
        content: str | Sequence[Message],
        max_new_tokens: int = contract.MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        on_text: Callable[[str], object] | None = None,
    ) -> Answer:
        """Go on with the conversation and answer.

        Tokens are fed as `generate` of transformers feeds them: the last one generated is not, and where it stops the
        answer, the chat template's next rendering supplies the end of the turn.

        Args:
            content: new messages, or a string: one user message where the model has a chat template, else plain text.
            max_new_tokens: the longest answer.
            temperature: 0 takes the likeliest token.
            top_p: sample among the likeliest tokens that hold this much probability.
            seed: of the sampling; None takes a new one.
            on_text: called with each piece of text as it is completed.

        Raises:
            ConfigError: an option is out of range.
            ExportError: the chat template refuses the messages, or does not continue this conversation.
        """
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ConfigError(
                "The answer's options do not hold.",
                "max_new_tokens must be 1 or more, temperature 0 or more, top_p above 0 and at most 1.",
                "Correct the option and try again.",
            )
        tokens = self._new_tokens(content)
        random = np.random.default_rng(seed)
        stream = TextStream(self._model.text.tokenizer)
        pieces: list[str] = []
        generated: list[int] = []
        stopped = False
        while not stopped and len(generated) < max_new_tokens:
            token = _pick(self._feed(tokens), temperature, top_p, random)
            generated.append(token)
            stopped = token in self._model.stop_tokens
            if not stopped:
                self._pending = tokens = [token]
                _give(stream.push(token), pieces, on_text)
        _give(stream.flush(), pieces, on_text)
        return Answer("".join(pieces), tuple(generated), stopped)

    def _new_tokens(self, content: str | Sequence[Message]) -> list[int]:
        """What has to be fed before the answer begins. An answer is never tokenized again: its place in the rendered
        text is marked, and what follows the mark is new."""
        text = self._model.text
        if isinstance(content, str) and not text.has_template:
            return [*self._pending, *text.encode(content, special_tokens=self._fed == 0)]
        new = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
        messages, head = list(self._messages), self._rendered
        if self._fed > 0:
            answer = _ANSWER.format(len(messages))
            messages.append({"role": "assistant", "content": answer})
            head += answer
        messages += new
        rendered = text.render(messages)
        if not rendered.startswith(head):
            raise ExportError(
                "The chat template does not continue this conversation.",
                "It renders the earlier turns differently once there are new ones.",
                "Start a new conversation, from this one's memory if it should remember.",
            )
        self._messages, self._rendered = messages, rendered
        return [*self._pending, *text.encode(rendered[len(head) :])]

    def _feed(self, tokens: list[int]) -> NDArray:
        """Logits `[V]` after `tokens`."""
        if not tokens:
            raise ExportError("There is nothing to answer.", "The text has no tokens.", "Give it some text.")
        count = len(tokens)
        logits, self._past = self._model.step(
            np.array([tokens], np.int64),
            np.ones((1, self._fed + count), np.int64),
            np.full((1, count), self._write),
            self._past,
        )
        self._fed += count
        self._pending = []
        return logits[0, -1]


def _pick(logits: NDArray, temperature: float, top_p: float, random: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    chances = np.exp(scaled[order] - scaled.max())
    chances /= chances.sum()
    kept = np.cumsum(chances) - chances < top_p  # up to the token that reaches top_p
    return int(random.choice(order[kept], p=chances[kept] / chances[kept].sum()))


def _give(piece: str, pieces: list[str], on_text: Callable[[str], object] | None) -> None:
    if piece:
        pieces.append(piece)
        if on_text is not None:
            on_text(piece)


def _stop_tokens(folder: Path) -> frozenset[int]:
    """Every id that ends an answer: generation_config.json gives one, a list, or none."""
    ids = read_json(folder / contract.GENERATION_CONFIG_FILE).get("eos_token_id")
    return frozenset([] if ids is None else ids if isinstance(ids, list) else [ids])


def _described(values) -> dict[str, tuple[str, list]]:
    return {value.name: (_TYPES.get(value.type, value.type), list(value.shape)) for value in values}


def _no_provider(name: str, why: str, next: str) -> ExportError:
    return ExportError(f"ONNX Runtime cannot run on {name} here.", why, next)
