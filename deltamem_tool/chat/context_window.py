"""The position in a conversation, and the context window when it is full.

The oldest turns leave the context, and what they wrote stays in the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from deltamem_tool.chat.engine import Engine, Past
from deltamem_tool.chat.generation import Token, feed
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.chat.transcript import Transcript
from deltamem_tool.errors import ConfigError
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.segments.messages import Message

KEPT_AFTER_EVICTION = 0.5  # at most this share of the window, so that turns only leave once in a while
ROOM_FOR_ANSWER = 0.25  # at most this share of the window; a longer answer ends where the window does


@dataclass(frozen=True)
class Place:
    """The position in a conversation. It is never changed, so going back to an earlier one undoes a turn.

    Args:
        past: None if it can be restored by truncating the next place's.
        memory: that of `past`, if the next place continues from this one.
        tokens: tokens in the past.
        pending: tokens that are not fed yet: the last generated one, unless another one was requested after it.
        foreign: whether the open segment in the memory belongs to another conversation.
    """

    past: Past | None
    memory: StoredMemory | None
    transcript: Transcript = Transcript()  # noqa: RUF009  (frozen)
    tokens: tuple[int, ...] = ()
    pending: tuple[Token, ...] = ()
    foreign: bool = True

    def earlier(self, engine: Engine) -> Place:
        """Return what is kept of this place when the next one continues from it."""
        past = None if engine.takes_back else self.past  # a hybrid's past cannot be restored by truncating
        return replace(self, past=past, memory=engine.memory(self.past))


def check_window(engine: Engine, window: int | None) -> None:
    """Check that a context can have this many tokens.

    Raises:
        ConfigError: the window is too small to use, or larger than the engine supports.
    """
    if window is not None and window < 2:
        raise ConfigError(
            f"A window of {window} tokens is too small.",
            "A prompt and an answer need at least two.",
            "Choose a larger one.",
        )
    if window is not None and engine.max_length is not None and window > engine.max_length:
        raise ConfigError(
            f"A window of {window} tokens is too large.",
            f"This model supports at most {engine.max_length}.",
            "Choose a smaller one. A model of a fixed length can be exported again with a larger --max-length.",
        )


def make_room(
    engine: Engine,
    place: Place,
    window: int | None,
    write: bool,
    content: str | Sequence[Message],
    sampling: Sampling,
) -> Place:
    """Return `place`, without its oldest turns if the window is too small for the prompt and an answer.

    The turns that stay are fed again from the current memory, without writing.

    Raises:
        ConfigError: the prompt does not fit, even alone with the system messages.
    """
    if window is None:
        return place
    text = engine.text
    room = max(1, min(sampling.max_new_tokens, int(window * ROOM_FOR_ANSWER)))
    new = len(place.transcript.begin(text, content)[1])
    if len(place.tokens) + len(place.pending) + new + room <= window:
        return place
    for count in reversed(range(len(place.transcript.turns))):
        transcript = place.transcript.keep(text, count)
        tokens = transcript.tokens(text)
        new = len(transcript.begin(text, content)[1])
        if len(tokens) <= window * KEPT_AFTER_EVICTION and len(tokens) + new + room <= window:
            return _evict(engine, place, write, transcript, tokens)
    transcript = place.transcript.keep(text, 0)
    tokens, new = transcript.tokens(text), len(transcript.begin(text, content)[1])
    if len(tokens) + new >= window:
        raise ConfigError(
            f"The prompt is longer than the window of {window} tokens.",
            f"With the system message it has {len(tokens) + new}, and the answer needs at least one.",
            "Shorten it, or use a larger window.",
        )
    return _evict(engine, place, write, transcript, tokens) if place.tokens or place.pending else place


def _evict(engine: Engine, place: Place, write: bool, transcript: Transcript, tokens: list[int]) -> Place:
    """Return a new context: `tokens`, fed from the current memory without writing."""
    past = place.past
    if place.foreign and write and engine.memory_shape.segment_width:
        past = close_segment(engine, past)
    if place.pending:  # otherwise they would never reach the memory
        past = _feed(engine, past, len(place.tokens), place.pending)
    past = engine.start(engine.memory(past))
    if tokens:
        past = _feed(engine, past, 0, [Token(token, writes=False) for token in tokens])
    # If no turn stays, none of the tokens fed later can end the last turn's segment.
    return Place(past, None, transcript, tuple(tokens), (), foreign=not transcript.turns)


def close_segment(engine: Engine, past: Past) -> Past:
    """Return `past` after the open segment of its memory is written."""
    return engine.with_memory(past, engine.memory(past).end_segment(engine.mechanism))


def _feed(engine: Engine, past: Past, context: int, tokens: Sequence[Token]) -> Past:
    """Feed `tokens` after `past`, which holds `context` tokens."""
    return feed(engine, past, np.ones((1, context), np.int64), [tokens])[1]
