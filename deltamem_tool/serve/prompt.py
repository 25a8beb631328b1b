"""Encode the messages of a request as one context: known messages are read only, new ones are read and written."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deltamem_tool.chat.context_window import ROOM_FOR_ANSWER
from deltamem_tool.chat.engine import Engine
from deltamem_tool.chat.generation import Token
from deltamem_tool.chat.text import ChatText
from deltamem_tool.chat.transcript import Transcript
from deltamem_tool.errors import DataError
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.segments.messages import Message, text_of
from deltamem_tool.segments.tags import SegmentTag
from deltamem_tool.serve.errors import RequestError
from deltamem_tool.serve.message_history import SYSTEM_ROLES, KnownMessages


@dataclass(frozen=True)
class Prompt:
    """The context to feed for a request.

    Args:
        memory: memory to start from.
        tokens: the whole context.
        answer_writes: whether the answer writes.
        room: maximum length of the answer within the window, in tokens; None for no limit.
        written: number of messages that write.
        dropped: number of known messages that have left the context.
    """

    memory: StoredMemory
    tokens: tuple[Token, ...]
    answer_writes: bool
    room: int | None
    written: int
    dropped: int


@dataclass(frozen=True)
class PromptRequest:
    """A request to encode.

    Args:
        messages: all messages that the client sends.
        known: which of them the memory has been fed.
        pending: tokens of the last known answer that it has not been fed.
        write: whether the memory changes.
        max_new_tokens: requested maximum length of the answer, in tokens.
    """

    messages: Sequence[Message]
    known: KnownMessages
    pending: int
    write: bool
    max_new_tokens: int


def build_prompt(engine: Engine, memory: StoredMemory, request: PromptRequest, window: int | None) -> Prompt:
    """Return the context to feed. If the window is too small for it, the oldest known messages are left out.

    What they wrote stays in the memory.

    Args:
        engine: the model.
        memory: memory that the request starts from.
        request: the request.
        window: maximum number of tokens in a context, including the answer.

    Raises:
        RequestError: the new messages do not fit into the window.
        ExportError: the chat template rejects the messages.
        DataError: the chat template leaves something out, or does not show where segments begin and end.
    """
    system = next((n for n, message in enumerate(request.messages) if message["role"] not in SYSTEM_ROLES), 0)
    split = _known_end(request, system)
    starts = [system, *_later_starts(request.messages, system, split)]

    def build(number: int) -> Prompt:
        return _build(engine, memory, request, _cut(request, system, starts[number], split))

    if window is None:
        return build(0)
    room = max(1, min(request.max_new_tokens, int(window * ROOM_FOR_ANSWER)))
    first = bisect_left(range(len(starts)), True, key=lambda number: len(build(number).tokens) + room <= window)
    prompt = build(min(first, len(starts) - 1))
    if len(prompt.tokens) >= window:
        raise RequestError(
            f"This model's maximum context length is {window} tokens.",
            f"The new messages have {len(prompt.tokens)} tokens, and the answer needs at least one.",
            "Shorten them.",
            code="context_length_exceeded",
            param="messages",
        )
    return replace(prompt, room=window - len(prompt.tokens))


@dataclass(frozen=True)
class _Cut:
    """A request's messages in two parts.

    Args:
        read: messages up to the last known answer; empty if there is none, or it has left the context.
        new: the other messages.
        known: for each new message, whether the memory was fed it.
        dropped: number of messages that have left the context.
    """

    read: Sequence[Message]
    new: Sequence[Message]
    known: Sequence[bool]
    dropped: int


def _known_end(request: PromptRequest, system: int) -> int:
    """Index of the first message after the last known answer; `system` if there is no such answer."""
    for number in reversed(range(system + 1, len(request.messages))):
        if request.messages[number]["role"] == "assistant" and all(request.known.messages[system : number + 1]):
            return number + 1
    return system


def _later_starts(messages: Sequence[Message], system: int, split: int) -> list[int]:
    """Later indices at which the context may begin: those of known turns, and the first message after them."""
    turns = [n for n in range(system + 1, split) if messages[n]["role"] == "user" != messages[n - 1]["role"]]
    return [*turns, split] if split > system else []


def _cut(request: PromptRequest, system: int, start: int, split: int) -> _Cut:
    """Return the system messages and the messages from `start` on."""
    messages, known = request.messages, request.known.messages
    if start < split:
        return _Cut([*messages[:system], *messages[start:split]], messages[split:], known[split:], start - system)
    return _Cut([], [*messages[:system], *messages[split:]], [*known[:system], *known[split:]], start - system)


def _build(engine: Engine, memory: StoredMemory, request: PromptRequest, cut: _Cut) -> Prompt:
    writes = request.write and not request.known.is_retry
    text, script, context = engine.text, Transcript(), list[Token]()
    if cut.read:
        *earlier, answer = cut.read
        script, token_ids = script.begin(text, earlier)
        answer_ids = text.encode(text_of(answer))
        script = script.with_answer(text_of(answer), answer_ids)
        context = [Token(token, writes=False) for token in (*token_ids, *answer_ids)]
    begin = len(script.head)
    script, token_ids = script.begin(text, cut.new)
    if not writes:
        new = [Token(token, writes=False) for token in token_ids]
        return Prompt(memory, (*context, *new), answer_writes=False, room=None, written=0, dropped=cut.dropped)
    flags = _write_flags(text, script, begin, token_ids, cut)
    goes_on = bool(cut.read) and request.known.is_complete
    pending = request.pending if goes_on else 0
    if pending:
        context[-pending:] = [token._replace(writes=True) for token in context[-pending:]]
    if engine.memory_shape.segment_width:
        tags, ended = script.tags(text, engine.mechanism.granularity, begin)
        # The memory's open segment belongs to the last answer. It continues only if this conversation was fed last.
        if not (goes_on and request.known.is_latest) or (ended and not pending):
            memory = memory.end_segment(engine.mechanism)
        if ended and pending:
            context[-1] = context[-1]._replace(ends=True)
        new = [
            Token(token, flag and tag != SegmentTag.OUTSIDE, flag and tag == SegmentTag.LAST)
            for token, flag, tag in zip(token_ids, flags, tags, strict=True)
        ]
    else:
        new = [Token(token, flag) for token, flag in zip(token_ids, flags, strict=True)]
    written = sum(not known for known in cut.known)
    return Prompt(memory, (*context, *new), answer_writes=True, room=None, written=written, dropped=cut.dropped)


def _write_flags(text: ChatText, script: Transcript, begin: int, token_ids: Sequence[int], cut: _Cut) -> list[bool]:
    """For each new token, whether it writes: those of unknown messages do, and the header of the answer.

    The first tokens complete the message of the last answer, and write if the first new message does. If the chat
    template does not show where messages begin, all tokens write.
    """
    if not any(cut.known):
        return [True] * len(token_ids)
    try:
        owners = script.owners(text, begin)
    except DataError:
        return [True] * len(token_ids)
    known = [*cut.known, False]
    return [not known[max(0, owner - len(cut.read))] for owner in owners]
