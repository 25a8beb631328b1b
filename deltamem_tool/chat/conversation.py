"""A conversation with a model that has a memory, in any runtime. Imports neither torch nor ONNX Runtime.

The context is what the model attends to: a KV cache that grows with every token. The memory has a fixed size and keeps
a trace of what has left the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deltamem_tool.chat.context_window import Place, check_window, close_segment, make_room
from deltamem_tool.chat.engine import Engine, Past, empty_memory
from deltamem_tool.chat.generation import (
    INTERRUPTED,
    LENGTH,
    STOP_STRING,
    STOP_TOKEN,
    Answer,
    AnswerStream,
    Row,
    Token,
    answer_rows,
)
from deltamem_tool.chat.sampling import Sampler, Sampling, token_mask
from deltamem_tool.errors import ConfigError, DeltaMemError, MemoryStateError
from deltamem_tool.io.atomic import resolve
from deltamem_tool.memory.file import StoredMemory, check_memory, read_memory
from deltamem_tool.memory.shared_file import SharedMemoryFile
from deltamem_tool.segments.messages import Message
from deltamem_tool.segments.tags import SegmentTag

__all__ = [
    "INTERRUPTED",
    "LENGTH",
    "STOP_STRING",
    "STOP_TOKEN",
    "Answer",
    "Context",
    "Conversation",
    "Engine",
    "Sampling",
    "generate_together",
]

DEFAULTS = Sampling()


@dataclass(frozen=True)
class Context:
    """The part of a conversation that the model attends to.

    Args:
        tokens: number of tokens in the context.
        window: maximum number of tokens; None for no limit.
        messages: number of the conversation's messages that are in the context.
        dropped: number of messages that have left it.
    """

    tokens: int
    window: int | None
    messages: int
    dropped: int


class Conversation:
    """One conversation with a model that has a memory.

    A conversation must be used from one thread at a time. Its engine can serve several threads.

    Args:
        engine: an `OnnxModel` or a `TorchModel`.
        memory: memory to start from; empty by default.
        write: whether the tokens of this conversation write into the memory.
        window: maximum number of tokens in the context; by default as many as the engine supports. If an answer might
            not fit, the oldest turns leave the context, and what they wrote stays in the memory.

    Raises:
        MemoryStateError: `memory` belongs to another adapter, does not fit, or holds more than one conversation.
        ConfigError: the window is too small to use, or larger than the engine supports; or the adapter writes by
            segments, which needs a chat template that the model lacks.

    Example:
        >>> import deltamem_tool as deltamem
        >>> from transformers import AutoTokenizer
        >>> model = deltamem.load("builtin:adapter")
        >>> engine = deltamem.TorchModel(model, AutoTokenizer.from_pretrained(model.name_or_path))
        >>> talk = deltamem.Conversation(engine)
        >>> _ = talk.generate("My dog is Rex.")
        >>> talk.save_memory("me.safetensors")
        >>> later = deltamem.Conversation(engine)
        >>> later.load_memory("me.safetensors")
        >>> later.generate("What is my dog's name?").text
        'Your dog is Rex.'
    """

    def __init__(
        self, engine: Engine, memory: StoredMemory | None = None, write: bool = True, window: int | None = None
    ) -> None:
        check_window(engine, window)
        if engine.memory_shape.segment_width and not engine.text.has_template:
            raise ConfigError(
                f"This adapter writes by {engine.mechanism.granularity}, which needs a chat template.",
                "The model has no chat template.",
                "Use a chat model, or an adapter that writes every token.",
            )
        self.engine = engine
        self.write = write
        self.window = engine.max_length if window is None else window
        memory = empty_memory(engine) if memory is None else memory
        _check_fits(engine, memory)
        self._place = Place(engine.start(memory), None)
        self.loaded: dict[Path, SharedMemoryFile] = {}  # by where they are
        self._before: list[Place] = []  # each turn, and each memory that was put in place

    @property
    def memory(self) -> StoredMemory:
        """The memory: by layer, states float32 `[1, H, R, R]` and open segments `[1, W]`.

        You can assign another memory. The context stays as it is, and `undo` restores the former memory.

        Raises:
            MemoryStateError: the assigned memory does not fit; nothing has changed.
        """
        return self.engine.memory(self._place.past)

    @memory.setter
    def memory(self, memory: StoredMemory) -> None:
        _check_fits(self.engine, memory)
        past = self.engine.with_memory(self._place.past, memory)
        former = self._place.earlier(self.engine)
        self._before, self._place = [*self._before, former], replace(self._place, past=past, foreign=True)

    @property
    def context(self) -> Context:
        """How much of the conversation is in the model's context."""
        script = self._place.transcript
        messages, dropped = (sum(len(turn.messages) + 1 for turn in turns) for turns in (script.turns, script.dropped))
        tokens = len(self._place.tokens) + len(self._place.pending)
        return Context(tokens, self.window, len(script.system) + messages, dropped)

    @property
    def messages(self) -> list[Message]:
        """All messages since the start or the last `forget`, including those that have left the context."""
        return self._place.transcript.messages

    def save_memory(self, path: str | Path) -> None:
        """Write the memory to a file that every runtime can load. The file is written whole or not at all.

        Raises:
            MemoryConflict: this conversation loaded the file and another program has changed it since. The memory was
                written to another file beside it.
            MemoryStateError: the memory contains NaN or infinity.
        """
        loaded = self.loaded.get(resolve(path))
        (loaded or SharedMemoryFile(path)).write(self.memory, replace=loaded is None)

    def load_memory(self, path: str | Path) -> None:
        """Replace the memory with that of a file. The context stays as it is, and `undo` restores the former memory.

        Raises:
            MemoryStateError: the file is missing, damaged or does not fit; nothing has changed.
        """
        file = SharedMemoryFile(path)
        self.memory = file.read() or read_memory(path)  # which says that there is no file
        self.loaded[resolve(path)] = file

    def forget(self) -> None:
        """Reset the memory to zeros and empty the context. This cannot be undone."""
        self._place = Place(self.engine.start(empty_memory(self.engine)), None)
        self._before.clear()

    def undo(self) -> bool:
        """Undo the last turn or the last change of memory, and restore memory, context and messages from before it.

        Further calls undo earlier turns, but none from before the second-to-last time that turns left the context.

        Returns:
            False if there is nothing to undo.
        """
        if not self._before:
            return False
        place = self._before.pop()
        if place.memory is not None:
            past = place.past
            if past is None:
                past = self.engine.take(self._place.past, 0, np.arange(len(place.tokens)))
            place = replace(place, past=self.engine.with_memory(past, place.memory), memory=None)
        self._place = place
        return True

    def generate(
        self,
        content: str | Sequence[Message],
        sampling: Sampling = DEFAULTS,
        on_text: Callable[[str], object] | None = None,
    ) -> Answer:
        """Add messages to the conversation and generate an answer.

        Tokens are fed as in transformers' `generate`: the last generated token is not fed. If it was a stop token, the
        chat template supplies the end of the turn when it renders the next one.

        A KeyboardInterrupt ends the answer, and the conversation keeps the text generated so far. If it comes before
        the prompt is fed, it is raised and nothing has changed.

        Args:
            content: new messages, or a string. A string is one user message if the model has a chat template, and plain
                text otherwise.
            sampling: how tokens are chosen and when the answer ends.
            on_text: called with each piece of text as soon as it is complete.

        Raises:
            ConfigError: the prompt is longer than the window.
            ExportError: the chat template rejects the messages or does not render them after the last answer, or there
                is nothing to answer.
            DataError: a message has no role, its content is not text or contains U+E000, or the chat template leaves it
                out.

        Whatever is raised, nothing has changed.
        """
        turn = _Turn(self, content, sampling, on_text)
        answer_rows(self.engine, [turn.row])
        return _commit([turn])[0]


def turn_content(conversation: Conversation, text: str, system: str | None) -> str | list[Message]:
    """Return what a user's text adds to a conversation: before the first turn, with the system message, if any."""
    if system is None or conversation.context.messages:
        return text
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def generate_together(
    conversations: Sequence[Conversation],
    contents: Sequence[str | Sequence[Message]],
    sampling: Sampling = DEFAULTS,
    on_text: Callable[[int, str], object] | None = None,
) -> list[Answer]:
    """Run `Conversation.generate` for several conversations of one engine, as one batch.

    Each conversation ends up as if it had run alone, except with models that count padding as positions, such as
    BART's. Either all conversations continue or none does: if anything is raised, even by a callback, all of them are
    unchanged.

    Args:
        conversations: distinct conversations.
        contents: content for each of them, as in `Conversation.generate`.
        sampling: options for all of them; each draws from the seed by itself.
        on_text: called with the index of a conversation, from 0, and a piece of its text.

    Raises:
        ConfigError: the conversations are not distinct, do not share an engine, or differ in number from `contents`.

    Other errors are those of `Conversation.generate`; the message names the conversation.
    """
    engines = {id(conversation.engine) for conversation in conversations}
    if len(conversations) != len(contents) or len(engines) != 1 or len(set(map(id, conversations))) < len(contents):
        raise ConfigError(
            "These conversations cannot be answered together.",
            "They must be distinct, share one engine, and have one content each.",
            "Pass one content per conversation.",
        )
    turns = []
    for number, (conversation, content) in enumerate(zip(conversations, contents, strict=True)):
        tell = None if on_text is None else _with_number(on_text, number)
        try:
            turns.append(_Turn(conversation, content, sampling, tell))
        except DeltaMemError as error:
            raise type(error)(f"Conversation {number + 1}: {error.what}", error.why, error.next) from error
    answer_rows(conversations[0].engine, [turn.row for turn in turns])
    return _commit(turns)


class _Outcome(NamedTuple):
    place: Place  # after the turn
    before: list[Place]  # each turn up to it
    answer: Answer


class _Turn:
    """A turn in progress. The conversation itself does not change until the turn is committed."""

    def __init__(
        self,
        conversation: Conversation,
        content: str | Sequence[Message],
        sampling: Sampling,
        on_text: Callable[[str], object] | None,
    ) -> None:
        engine = conversation.engine
        self.conversation = conversation
        self._start = start = make_room(
            engine, conversation._place, conversation.window, conversation.write, content, sampling
        )
        self._transcript, tokens = start.transcript.begin(engine.text, content)
        past, fed = self._mark_tokens(tokens)
        limit = sampling.max_new_tokens
        if conversation.window is not None:
            limit = min(limit, conversation.window - len(start.tokens) - len(fed))
        self.row = Row(
            past=past,
            context=start.tokens,
            tokens=fed,
            answer_writes=conversation.write,
            limit=limit,
            sampler=Sampler(
                sampling,
                np.array([*start.tokens, *(token.id for token in fed)], np.int64),
                token_mask(engine.text.ids | engine.stop_tokens),
            ),
            stream=AnswerStream(engine.text, sampling.stop, on_text),
        )

    def _mark_tokens(self, tokens: list[int]) -> tuple[Past, list[Token]]:
        """The past to start from, and the tokens to feed.

        The last answer's segment ends with its message's last token, as the template writes it; one that is another
        conversation's ends before anything is fed.
        """
        start, engine, write = self._start, self.conversation.engine, self.conversation.write
        past, pending = start.past, list(start.pending)
        if not (write and engine.memory_shape.segment_width):
            return past, [*pending, *(Token(token, write) for token in tokens)]
        begin = len(start.transcript.head)
        tags, ended = self._transcript.tags(engine.text, engine.mechanism.granularity, begin)
        if start.foreign or (ended and not pending):
            past = close_segment(engine, past)
        if ended and pending:
            pending[-1] = pending[-1]._replace(ends=True)
        tagged = zip(tokens, tags, strict=True)
        return past, [
            *pending,
            *(Token(token, tag != SegmentTag.OUTSIDE, tag == SegmentTag.LAST) for token, tag in tagged),
        ]

    def outcome(self) -> _Outcome:
        """Return the conversation's state after this turn."""
        row, conversation, start = self.row, self.conversation, self._start
        place, before = conversation._place, conversation._before
        if start is place:  # nothing has left the context: it is the beginning of the new one
            place = place.earlier(conversation.engine)
        else:  # it is kept whole; of such, which are large, one is enough
            whole = [number for number, earlier in enumerate(before) if earlier.memory is None]
            before = before[whole[-1] + 1 if whole else 0 :]
        answer = row.answer
        after = Place(
            past=row.past,
            memory=None,
            transcript=self._transcript.with_answer(answer.text, row.answer_tokens),
            tokens=(*start.tokens, *(token.id for token in row.tokens[: row.fed])),
            pending=tuple(row.tokens[row.fed :]),
            foreign=False,
        )
        return _Outcome(after, [*before, place], answer)


def _commit(turns: Sequence[_Turn]) -> list[Answer]:
    """Apply all turns or none: what can fail comes first, and Ctrl-C in between reverts the turns already applied."""
    conversations, outcomes = [turn.conversation for turn in turns], [turn.outcome() for turn in turns]
    former = [(conversation._place, conversation._before) for conversation in conversations]
    done = False
    try:
        for conversation, outcome in zip(conversations, outcomes, strict=True):
            conversation._place, conversation._before = outcome.place, outcome.before
        done = True
    finally:
        if not done:
            for conversation, (place, before) in zip(conversations, former, strict=True):
                conversation._place, conversation._before = place, before
    return [outcome.answer for outcome in outcomes]


def _check_fits(engine: Engine, memory: StoredMemory) -> None:
    check_memory(memory.shape, memory.adapter, engine.memory_shape, engine.adapter)
    rows = {len(state) for state in memory.states.values()}
    if rows != {1}:
        raise MemoryStateError(
            "A memory to start from must hold one conversation.",
            f"This one holds {max(rows)} rows.",
            "Select one with `MemoryState.select`, and save it.",
        )


def _with_number(on_text: Callable[[int, str], object], number: int) -> Callable[[str], object]:
    return lambda piece: on_text(number, piece)
