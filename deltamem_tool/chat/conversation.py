"""Turns of one conversation, its context and its memory, in any runtime. No torch and no ONNX Runtime.

The context is what the model attends to, a KV cache that grows by every token; the memory is of a fixed size and keeps
a trace of what has left the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deltamem_tool.chat.context_window import Place, check_window, closed, with_room
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
    """What the model attends to.

    Args:
        tokens: how many.
        window: how many it may hold; None for any number.
        messages: how many of the conversation's messages are in it.
        dropped: how many have left it.
    """

    tokens: int
    window: int | None
    messages: int
    dropped: int


class Conversation:
    """One conversation. Not for several threads at once; the engine is.

    Args:
        engine: `OnnxModel` or `TorchModel`.
        memory: what it remembers from before; nothing by default.
        write: whether its tokens write.
        window: the most tokens that its context may hold; by default as many as the engine can. When an answer might
            not fit, the oldest turns leave the context, and what they wrote stays in the memory.

    Raises:
        MemoryStateError: `memory` is another adapter's, or does not fit, or is not of one conversation.
        ConfigError: the window is too small for anything, or larger than the engine's room; or the adapter's segments
            need a chat template.

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
                f"This adapter writes by {engine.mechanism.granularity}, and the model cannot tell where one ends.",
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
        """States float32 `[1, H, R, R]` and open segments `[1, W]` by layer.

        Another may be put in its place; the context stays, and `undo` takes it back.

        Raises:
            MemoryStateError: the other does not fit; nothing has changed then.
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
        """How much of the conversation the model attends to."""
        script = self._place.transcript
        messages, dropped = (sum(len(turn.messages) + 1 for turn in turns) for turns in (script.turns, script.dropped))
        tokens = len(self._place.tokens) + len(self._place.pending)
        return Context(tokens, self.window, len(script.system) + messages, dropped)

    @property
    def messages(self) -> list[Message]:
        """Everything that was said since it began or was told to forget, whether it is still in the context or not."""
        return self._place.transcript.messages

    def save_memory(self, path: str | Path) -> None:
        """Write a memory file, whole or not at all, which every runtime loads.

        Raises:
            MemoryConflict: this conversation has loaded the file, and another program has changed it since; the memory
                is in a file beside it.
            MemoryStateError: it holds NaN or infinity.
        """
        loaded = self.loaded.get(resolve(path))
        (loaded or SharedMemoryFile(path)).write(self.memory, replace=loaded is None)

    def load_memory(self, path: str | Path) -> None:
        """Put the memory of a file in place of this one; the context stays, and `undo` takes it back.

        Raises:
            MemoryStateError: the file is missing or damaged, or does not fit; nothing has changed then.
        """
        file = SharedMemoryFile(path)
        self.memory = file.read() or read_memory(path)  # which says that there is no file
        self.loaded[resolve(path)] = file

    def forget(self) -> None:
        """Start from nothing: the memory zeros, the context empty. It cannot be undone."""
        self._place = Place(self.engine.start(empty_memory(self.engine)), None)
        self._before.clear()

    def undo(self) -> bool:
        """Take back the last turn or the memory loaded since: memory, context and messages are as they were before.

        So can those before be, but none from before the last but one time that turns left the context.

        Returns:
            False if there is none.
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
        """Go on with the conversation and answer.

        Tokens are fed as `generate` of transformers feeds them: the last one generated is not, and where it stops the
        answer, the chat template's next rendering supplies the end of the turn. A KeyboardInterrupt ends the answer;
        what was said until then stays. (One that comes before the prompt is fed is raised, and nothing has changed.)

        Args:
            content: new messages, or a string: one user message where the model has a chat template, else plain text.
            sampling: how tokens are chosen and where the answer ends.
            on_text: called with each piece of text as it is completed.

        Raises:
            ConfigError: the prompt is longer than the window.
            ExportError: the chat template refuses the messages, or does not write them after the last answer; or there
                is nothing to answer.
            DataError: a message has no role, or something else than text, or the chat template leaves it out. Whatever
                is raised, nothing has changed.
        """
        turn = _Turn(self, content, sampling, on_text)
        answer_rows(self.engine, [turn.row])
        return _commit([turn])[0]


def generate_together(
    conversations: Sequence[Conversation],
    contents: Sequence[str | Sequence[Message]],
    sampling: Sampling = DEFAULTS,
    on_text: Callable[[int, str], object] | None = None,
) -> list[Answer]:
    """`Conversation.generate` for several conversations of one engine, one call of the model for all of them.

    Afterwards each of them is as if it had been alone (models that count padding as positions, such as BART's, aside).
    All of them go on, or none: whatever is raised, by a callback too, every one is as it was.

    Args:
        conversations: different ones.
        contents: of each, as in `Conversation.generate`.
        sampling: of all; each draws from the seed by itself.
        on_text: called with the number of the conversation, from 0, and a piece of its text.

    Raises:
        ConfigError: they are not different conversations of one engine, or their contents are not as many; or as in
            `Conversation.generate`, for the conversation that is named.
    """
    engines = {id(conversation.engine) for conversation in conversations}
    if len(conversations) != len(contents) or len(engines) != 1 or len(set(map(id, conversations))) < len(contents):
        raise ConfigError(
            "These conversations cannot be answered together.",
            "Each must be another one, of the same engine, and have its content.",
            "Pass one content a conversation.",
        )
    turns = []
    for number, (conversation, content) in enumerate(zip(conversations, contents, strict=True)):
        tell = None if on_text is None else _numbered(on_text, number)
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
    """A turn that is being answered; its conversation does not change."""

    def __init__(
        self,
        conversation: Conversation,
        content: str | Sequence[Message],
        sampling: Sampling,
        on_text: Callable[[str], object] | None,
    ) -> None:
        engine = conversation.engine
        self.conversation = conversation
        self._start = start = with_room(
            engine, conversation._place, conversation.window, conversation.write, content, sampling
        )
        self._transcript, tokens = start.transcript.begin(engine.text, content)
        past, fed = self._marked(tokens)
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

    def _marked(self, tokens: list[int]) -> tuple[Past, list[Token]]:
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
            past = closed(engine, past)
        if ended and pending:
            pending[-1] = pending[-1]._replace(ends=True)
        tagged = zip(tokens, tags, strict=True)
        return past, [
            *pending,
            *(Token(token, tag != SegmentTag.OUTSIDE, tag == SegmentTag.LAST) for token, tag in tagged),
        ]

    def outcome(self) -> _Outcome:
        """How the conversation goes on from here."""
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
            transcript=self._transcript.answered(answer.text, row.answer_tokens),
            tokens=(*start.tokens, *(token.id for token in row.tokens[: row.fed])),
            pending=tuple(row.tokens[row.fed :]),
            foreign=False,
        )
        return _Outcome(after, [*before, place], answer)


def _commit(turns: Sequence[_Turn]) -> list[Answer]:
    """All conversations go on, or none: what can fail comes first, and Ctrl-C in the middle takes the others back."""
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
            "A conversation starts from one memory.", f"This one holds {max(rows)} rows.", "Pick one row."
        )


def _numbered(on_text: Callable[[int, str], object], number: int) -> Callable[[str], object]:
    return lambda piece: on_text(number, piece)
