"""Generate answers token by token, with one call of the engine for all rows of a batch. Each row ends on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.chat.engine import Engine, Past
from deltamem_tool.chat.sampling import Sampler, Sampling, token_mask
from deltamem_tool.chat.text import ChatText, TextStream
from deltamem_tool.memory.file import StoredMemory

STOP_TOKEN, STOP_STRING, LENGTH, INTERRUPTED = "stop token", "stop string", "length", "interrupted"


class AnswerStream:
    """The text of an answer while it is generated. Text that may become a stop string is held back.

    Args:
        text: tokenizer of the model.
        stop: stop strings; the answer ends before the first one.
        on_text: called with each piece of text.
    """

    def __init__(self, text: ChatText, stop: Sequence[str], on_text: Callable[[str], object] | None) -> None:
        self._stream = TextStream(text.tokenizer)
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._on_text = on_text
        self._held = ""
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> bool:
        """Add a token, and return whether it completes a stop string. Nothing may follow in that case."""
        return self._add(self._stream.push(token))

    def end(self) -> None:
        """Release the text that was held back: no token follows."""
        if not self._add(self._stream.flush()):
            self._emit(self._held)

    def interrupt(self) -> None:
        """Do the same as `end`, without calling `on_text`."""
        self._on_text = None
        self.end()

    def _add(self, piece: str) -> bool:
        if not self._stop:
            self._emit(piece)
            return False
        text = self._held + piece
        starts = [start for start in map(text.find, self._stop) if start >= 0]
        if starts:
            self._held = ""
            self._emit(text[: min(starts)])
            return True
        ends = range(max(0, len(text) - self._longest), len(text))
        keep = next((n for n in ends if any(stop.startswith(text[n:]) for stop in self._stop)), len(text))
        self._held = text[keep:]
        self._emit(text[:keep])
        return False

    def _emit(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._on_text is not None:
                self._on_text(piece)


@dataclass(frozen=True)
class Answer:
    """An answer and why it ended.

    Args:
        text: text of the answer, without what ended it.
        tokens: generated tokens, including a stop token or the last token of a stop string.
        why: STOP_TOKEN, STOP_STRING, LENGTH (`max_new_tokens`, or the window is full) or INTERRUPTED.
    """

    text: str
    tokens: tuple[int, ...]
    why: str

    @property
    def stopped(self) -> bool:
        """Whether the model itself ended the answer."""
        return self.why in (STOP_TOKEN, STOP_STRING)


class Token(NamedTuple):
    """A token, whether it writes or belongs to a segment, and whether it ends one."""

    id: int
    writes: bool
    ends: bool = False


@dataclass
class Row:
    """One conversation in a batch.

    Args:
        past: past to start from, of one row.
        context: tokens in that past.
        tokens: tokens to feed: the prompt, then the answer as it grows.
        answer_writes: whether the tokens of the answer write.
        limit: maximum length of the answer, in tokens.
        sampler: chooses the tokens.
        stream: text of the answer.
    """

    past: Past
    context: Sequence[int]
    tokens: list[Token]
    answer_writes: bool
    limit: int
    sampler: Sampler
    stream: AnswerStream
    fed: int = 0  # of `tokens`
    why: str = INTERRUPTED  # until it ends otherwise
    last: list[int] = field(default_factory=list)  # a token that ended the answer and is not fed
    prompt: int = field(init=False)  # tokens of it

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def is_generating(self) -> bool:
        """Whether the answer has not ended yet."""
        return self.why == INTERRUPTED

    @property
    def answer_tokens(self) -> list[int]:
        """Tokens of the answer in the context, fed or not."""
        return [token.id for token in self.tokens[self.prompt :]]

    @property
    def answer(self) -> Answer:
        """The answer so far."""
        return Answer(self.stream.text, (*self.answer_tokens, *self.last), self.why)

    def take(self, token: int, stop_tokens: frozenset[int]) -> None:
        """Choose the next token of the answer."""
        if token in stop_tokens:
            self.last, self.why = [token], STOP_TOKEN
            self.stream.end()
            return
        self.tokens.append(Token(token, self.answer_writes))
        if self.stream.push(token):
            self.tokens.pop()
            self.last, self.why = [token], STOP_STRING
        elif len(self.tokens) - self.prompt >= self.limit:
            self.stream.end()
            self.why = LENGTH


def feed(
    engine: Engine,
    past: Past,
    attention_mask: NDArray[Any],
    rows: Sequence[Sequence[Token]],
    all_positions: bool = False,
) -> tuple[NDArray[Any], Past, NDArray[Any]]:
    """Feed each row its tokens, padded on the left.

    Args:
        engine: the model.
        past: past with B rows of P columns.
        attention_mask: int64 `[B, P]`, 0 at padding.
        rows: B lists of tokens.
        all_positions: return the logits of every position.

    Returns:
        The results of `Engine.step`, and the mask of the new past.
    """
    ids = _pad_left([[token.id for token in tokens] for tokens in rows], np.int64)
    writes = _pad_left([[token.writes for token in tokens] for tokens in rows], np.bool_)
    ends = _pad_left([[token.ends for token in tokens] for tokens in rows], np.bool_)
    mask = np.concatenate([attention_mask, _pad_left([[1] * len(tokens) for tokens in rows], np.int64)], axis=1)
    segment_end = ends if engine.memory_shape.segment_width else None
    logits, past = engine.step(past, ids, mask, writes, segment_end, all_positions)
    return logits, past, mask


def answer_prompts(
    engine: Engine,
    memory: StoredMemory,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    write: bool = False,
) -> list[Answer]:
    """Answer prompts greedily in one batch, each in a context of its own.

    Args:
        engine: the model.
        memory: memory that the prompts read, a row for each.
        prompts: token ids.
        max_new_tokens: maximum length of an answer, in tokens.
        write: whether prompts and answers also write; the memory afterwards is not returned.
    """
    sampling, valid = Sampling(max_new_tokens), token_mask(engine.text.ids | engine.stop_tokens)
    rows = [
        Row(
            past=None,
            context=(),
            tokens=[Token(token, write) for token in prompt],
            answer_writes=write,
            limit=max_new_tokens if engine.max_length is None else min(max_new_tokens, engine.max_length - len(prompt)),
            sampler=Sampler(sampling, np.array(prompt, np.int64), valid),
            stream=AnswerStream(engine.text, (), None),
        )
        for prompt in prompts
    ]
    batch = _Batch(engine, rows, engine.start(memory), np.zeros((len(rows), 0), np.int64))
    _generate(batch, batch.feed(), engine.stop_tokens)
    return [row.answer for row in rows]


class _Batch:
    """Rows that are fed together, padded on the left."""

    def __init__(self, engine: Engine, rows: Sequence[Row], past: Past, mask: NDArray[Any]) -> None:
        self._engine = engine
        self._state = rows, past, mask  # of the same call, whenever it is interrupted; mask int64 [B, P]

    @classmethod
    def from_rows(cls, engine: Engine, rows: Sequence[Row]) -> _Batch:
        mask = _pad_left([[1] * (len(row.context) + row.fed) for row in rows], np.int64)
        return cls(engine, rows, engine.join([row.past for row in rows]), mask)

    @classmethod
    def join(cls, batches: Sequence[_Batch]) -> _Batch:
        if len(batches) == 1:
            return batches[0]
        engine = batches[0]._engine
        rows, pasts, masks = zip(*(batch._state for batch in batches), strict=True)
        mask = _pad_left([row for mask in masks for row in mask.tolist()], np.int64)
        return cls(engine, [row for of_batch in rows for row in of_batch], engine.join(pasts), mask)

    @property
    def rows(self) -> Sequence[Row]:
        return self._state[0]

    def feed(self) -> NDArray[Any]:
        """Logits `[B, V]` of `rows` after all tokens that were not fed yet; of rows that have ended they mean nothing.

        Where there is room for so many columns and no more, rows that have ended leave first, and padding with them:
        each of the others fits by itself.
        """
        room, width = self._engine.max_length, max(len(row.tokens) - row.fed for row in self.rows if row.is_generating)
        if room is not None and self._state[2].shape[1] + width > room:
            self.split()
            self._state = _Batch.from_rows(self._engine, [row for row in self.rows if row.is_generating])._state
        rows, past, mask = self._state
        fresh = [row.tokens[row.fed :] if row.is_generating else [] for row in rows]
        logits, *fed = feed(self._engine, past, mask, fresh)
        self._state = rows, *fed
        for row, tokens in zip(rows, fresh, strict=True):
            row.fed += len(tokens)
        return logits

    def split(self) -> None:
        """Give every row its own past, and the number of tokens that are in it."""
        rows, past, mask = self._state
        for number, row in enumerate(rows):
            columns = np.flatnonzero(mask[number])
            whole = len(rows) == 1 and len(columns) == mask.shape[1]
            row.past = past if whole else self._engine.take(past, number, columns)
            row.fed = len(columns) - len(row.context)


def answer_rows(engine: Engine, rows: Sequence[Row]) -> None:
    """Feed the rows and let them answer, until each has ended or somebody interrupts; then every row has its own past.

    Prompts go in together where nothing but padding on the left of everything is needed for it. Padding between a
    context and a prompt would push tokens out of the windows of layers that have one, so such prompts go in one by one.

    Raises:
        KeyboardInterrupt: it came before every prompt was in.
    """
    width = max(len(row.tokens) for row in rows)
    together = all(len(row.tokens) == width or not row.context for row in rows)
    batches = [_Batch.from_rows(engine, rows)] if together else [_Batch.from_rows(engine, [row]) for row in rows]
    try:
        logits = np.concatenate([batch.feed() for batch in batches])
        batches = [_Batch.join(batches)]
        _generate(batches[0], logits, engine.stop_tokens)
    except KeyboardInterrupt:
        if any(row.fed == 0 for row in rows):
            raise
        for row in rows:
            if row.is_generating:
                row.stream.interrupt()
    for batch in batches:
        batch.split()


def _generate(batch: _Batch, logits: NDArray[Any], stop_tokens: frozenset[int]) -> None:
    while True:
        for row, of_row in zip(batch.rows, logits, strict=True):
            if row.is_generating:
                row.take(row.sampler.pick(of_row), stop_tokens)
        if not any(row.is_generating for row in batch.rows):
            return
        logits = batch.feed()


def _pad_left(rows: Sequence[Sequence[int | bool]], dtype: type) -> NDArray[Any]:
    """Rows of any lengths as `[B, longest]`, zeros on the left."""
    width = max(map(len, rows))
    return np.array([[0] * (width - len(row)) + list(row) for row in rows], dtype).reshape(len(rows), width)
