"""A request's messages as the tokens of one context: what is known is read, what is new is read and writes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deltamem_tool.chat.context_window import ROOM_FOR_ANSWER
from deltamem_tool.chat.engine import Engine
from deltamem_tool.chat.generation import Token
from deltamem_tool.chat.transcript import Transcript
from deltamem_tool.errors import DataError
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.segments.messages import Message, text_of
from deltamem_tool.segments.tags import SegmentTag
from deltamem_tool.serve.errors import RequestError
from deltamem_tool.serve.fed import SYSTEM_ROLES, Known


@dataclass(frozen=True)
class Prompt:
    """What is fed for a request.

    Args:
        memory: what it starts from.
        tokens: the whole context.
        answer_writes: whether the answer writes.
        room: the longest answer that the window leaves room for; None for any.
        written: how many messages write.
        dropped: how many known ones have left the context.
    """

    memory: StoredMemory
    tokens: tuple[Token, ...]
    answer_writes: bool
    room: int | None
    written: int
    dropped: int


@dataclass(frozen=True)
class Asked:
    """A request.

    Args:
        messages: all that the client sends.
        known: which of them the memory was fed.
        pending: tokens of the last known answer that it was not fed.
        write: whether the memory changes.
        max_new_tokens: the longest answer that is wanted.
    """

    messages: Sequence[Message]
    known: Known
    pending: int
    write: bool
    max_new_tokens: int


def build_prompt(engine: Engine, memory: StoredMemory, asked: Asked, window: int | None) -> Prompt:
    """Return what to feed; where the window is too small for all, without the oldest of the messages that are known.

    What they wrote stays in the memory.

    Args:
        engine: the model.
        memory: what the request starts from.
        asked: the request.
        window: the most tokens of a context, the answer's too.

    Raises:
        RequestError: what is new does not fit into the window.
        ExportError: the chat template refuses the messages.
        DataError: the chat template leaves something out, or does not let the segments be told.
    """
    system = next((n for n, message in enumerate(asked.messages) if message["role"] not in SYSTEM_ROLES), 0)
    starts = [system, *_later_starts(asked, system)]

    def built(number: int) -> Prompt:
        return _built(engine, memory, asked, system, starts[number])

    if window is None:
        return built(0)
    room = max(1, min(asked.max_new_tokens, int(window * ROOM_FOR_ANSWER)))
    first = bisect_left(range(len(starts)), True, key=lambda number: len(built(number).tokens) + room <= window)
    prompt = built(min(first, len(starts) - 1))
    if len(prompt.tokens) >= window:
        raise RequestError(
            f"This model's maximum context length is {window} tokens.",
            f"The messages have {len(prompt.tokens)} that the memory does not have yet, and the answer needs one.",
            "Shorten them.",
            code="context_length_exceeded",
            param="messages",
        )
    return replace(prompt, room=window - len(prompt.tokens))


def _later_starts(asked: Asked, system: int) -> list[int]:
    """Where the context may begin instead of with the first message after those of the system: with a known turn."""
    split = _known_end(asked, system)
    messages = asked.messages
    turns = [n for n in range(system + 1, split) if messages[n]["role"] == "user" != messages[n - 1]["role"]]
    return [*turns, split] if split > system else []


def _known_end(asked: Asked, system: int) -> int:
    """Where the messages after the last known answer begin; `system` where there is no answer that can be told."""
    messages = asked.messages
    for number in reversed(range(system + 1, len(messages))):
        if messages[number]["role"] == "assistant" and all(asked.known.messages[system : number + 1]):
            return number + 1
    return system


def _built(engine: Engine, memory: StoredMemory, asked: Asked, system: int, start: int) -> Prompt:
    """The prompt whose context begins with the system messages, and then with message `start`."""
    text, messages = engine.text, asked.messages
    split = _known_end(asked, system)
    script, context = Transcript(), list[Token]()
    earlier = [*messages[:system], *messages[start : split - 1]] if start < split else []
    goes_on = len(earlier) > 0
    if goes_on:
        script, fed = script.begin(text, earlier)
        answer = text.encode(text_of(messages[split - 1]))
        script = script.answered(text_of(messages[split - 1]), answer)
        context = [Token(token, writes=False) for token in (*fed, *answer)]
    begin = len(script.head)
    new = messages[split:] if goes_on else [*messages[:system], *messages[max(start, split) :]]
    script, fed = script.begin(text, new)
    flags = [*asked.known.messages[split:]] if goes_on else [
        *asked.known.messages[:system], *asked.known.messages[max(start, split) :]
    ]  # fmt: skip
    writes = _writes(engine, script, begin, fed, flags, len(earlier) + goes_on) if asked.write else [False] * len(fed)
    any_new = asked.write and not asked.known.repeats
    continues = goes_on and asked.known.whole
    if continues and any_new and asked.pending:
        context[-asked.pending :] = [token._replace(writes=True) for token in context[-asked.pending :]]
    if any_new and engine.memory_shape.segment_width:
        memory, context, marked = _segmented(engine, memory, asked, script, begin, context, fed, writes, continues)
    else:
        marked = [Token(*token) for token in zip(fed, writes, strict=True)]
    return Prompt(
        memory=memory,
        tokens=(*context, *marked),
        answer_writes=any_new,
        room=None,
        written=sum(not flag for flag in flags) if any_new else 0,
        dropped=start - system,
    )


def _writes(
    engine: Engine, script: Transcript, begin: int, fed: Sequence[int], known: Sequence[bool], before: int
) -> list[bool]:
    """Which of the tokens of a turn write: those of messages that are not `known`, and the header of the answer.

    `before` is how many messages are before the turn's. The rest of the last answer's message, which comes first, is
    new where the first message is. Where the template does not let the messages be told apart, all of them write.
    """
    if not any(known):
        return [True] * len(fed)
    if all(known):
        return [False] * len(fed)
    try:
        owners = script.owners(engine.text, begin)
    except DataError:
        return [True] * len(fed)
    flags = [*known, False]
    return [not flags[max(0, owner - before)] for owner in owners]


def _segmented(
    engine: Engine,
    memory: StoredMemory,
    asked: Asked,
    script: Transcript,
    begin: int,
    context: list[Token],
    fed: Sequence[int],
    writes: Sequence[bool],
    continues: bool,
) -> tuple[StoredMemory, list[Token], list[Token]]:
    """The same where the memory is written by segments: what starts it, the context and the marked new tokens.

    The open segment of the memory is the last answer's. It goes on where this conversation was the last that was fed,
    and ends before anything else is.
    """
    tags, ended = script.tags(engine.text, engine.mechanism.granularity, begin)
    pending = asked.pending if continues else 0
    if not (continues and asked.known.newest) or (ended and not pending):
        memory = memory.end_segment(engine.mechanism)
    if ended and pending:
        context[-1] = context[-1]._replace(ends=True)
    marked = [
        Token(token, write and tag != SegmentTag.OUTSIDE, write and tag == SegmentTag.LAST)
        for token, write, tag in zip(fed, writes, tags, strict=True)
    ]
    return memory, context, marked
