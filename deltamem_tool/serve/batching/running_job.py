"""The row of a ticket while the scheduler runs it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.chat.engine import Engine, Past
from deltamem_tool.chat.generation import AnswerStream, Row, feed
from deltamem_tool.chat.group import PastRow
from deltamem_tool.chat.sampling import Sampler
from deltamem_tool.chat.text import ChatText
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.serve.batching.job import Completion
from deltamem_tool.serve.batching.prefix_cache import Prefix, PrefixCache, prefix_keys
from deltamem_tool.serve.batching.ticket import Ticket


class _TokenStream(AnswerStream):
    """Passes tokens on undecoded, for the reader to decode. Without a reader, they are decoded at the end."""

    def __init__(self, text: ChatText, stop: Sequence[str], put: Callable[[Any], object] | None) -> None:
        super().__init__(text, stop, None)
        self._put = put
        self._tokens: list[int] = []  # without a reader
        self._decode = text.tokenizer.decode

    def push(self, token: int) -> bool:
        """See `AnswerStream.push`."""
        (self._put or self._tokens.append)(token)
        return False

    def end(self) -> None:
        """Decode the tokens if there is no reader. No text is held back."""
        self._emit(self._decode(self._tokens))


class RunningJob:
    """A row and its ticket.

    Args:
        engine: the model.
        ticket: ticket of a job that was checked.
        valid: `token_mask` of the tokens that an answer may contain.
        piece: maximum number of prompt tokens per call.

    Attributes:
        row: the row.
        cached: number of prompt tokens that were in the cache.
        past_row: its row of a past, after the prompt was fed and until it joins a group.
    """

    past_row: PastRow

    def __init__(self, engine: Engine, ticket: Ticket, valid: NDArray[Any], piece: int) -> None:
        job, tokens = ticket.job, list(ticket.job.tokens)
        limit = job.sampling.max_new_tokens
        if engine.max_length is not None:
            limit = min(limit, engine.max_length - len(tokens))
        sampler = Sampler(job.sampling, np.array([token.id for token in tokens], np.int64), valid)
        put = ticket.put if job.streamed else None
        stream = (AnswerStream if job.sampling.stop else _TokenStream)(engine.text, job.sampling.stop, put)
        self.ticket = ticket
        self.row = Row(None, (), tokens, job.answer_writes, limit, sampler, stream)
        self.cached = 0
        self._memories: list[StoredMemory] = []  # after each piece of the prompt
        self._whole_pieces: Past = None  # after the last piece, unless that was in the cache
        self._piece, self._keys = piece, prefix_keys(job, piece)
        self._started = time.monotonic()
        self._first_token = math.inf

    @property
    def is_short(self) -> bool:
        """Whether the prompt is fed as one piece, which is neither read from the cache nor kept there."""
        return self.row.prompt <= self._piece

    def begin(self, engine: Engine, cache: PrefixCache) -> None:
        """Start from the memory, or from the longest prefix of the prompt in the cache."""
        prefix = cache.longest(self._keys)
        if prefix is None:
            self.row.past = engine.start(self.ticket.job.memory)
            return
        self.row.past, self._memories = prefix.past, [*prefix.memories]
        self.row.fed = self.cached = len(prefix.keys) * self._piece

    def feed_piece(self, engine: Engine) -> NDArray[Any]:
        """Feed the prompt up to the end of a piece, and return the logits `[1, V]` after it.

        Pieces begin at the same positions in every prompt, so that a cached prefix equals what would be computed again.
        """
        row = self.row
        tokens = row.tokens[row.fed : (row.fed // self._piece + 1) * self._piece]
        logits, row.past, _ = feed(engine, row.past, np.ones((1, row.fed), np.int64), [tokens])
        row.fed += len(tokens)
        if row.fed <= len(self._keys) * self._piece:
            self._memories.append(engine.memory(row.past))
            self._whole_pieces = row.past
        self.past_row = PastRow(row.past, 1, row.fed, 0, row.fed)
        return logits

    @staticmethod
    def feed_short(engine: Engine, jobs: Sequence[RunningJob]) -> NDArray[Any]:
        """Feed short prompts in one call, and return their logits `[B, V]`."""
        rows = [running.row for running in jobs]
        past = engine.start(StoredMemory.stack([running.ticket.job.memory for running in jobs]))
        logits, past, mask = feed(engine, past, np.zeros((len(rows), 0), np.int64), [row.tokens for row in rows])
        for number, running in enumerate(jobs):
            running.row.fed = running.row.prompt
            running.past_row = PastRow(past, len(rows), mask.shape[1], number, running.row.prompt)
        return logits

    @property
    def prefix(self) -> Prefix | None:
        """The part of the prompt that the cache does not have yet."""
        past, job = self._whole_pieces, self.ticket.job
        return None if past is None else Prefix(self._keys, past, self._memories, job.tenant, job.names)

    def forget(self, tenant: str, name: str) -> None:
        """Add nothing to the cache if the job belongs to this tenant and has this name."""
        job = self.ticket.job
        if job.tenant == tenant and name in job.names:
            self._keys, self._whole_pieces = [], None

    def take(self, logits: NDArray[Any], likeliest: int | None, stop_tokens: frozenset[int]) -> bool:
        """Choose the next token of the answer, and return whether the answer continues.

        Args:
            logits: `[V]`.
            likeliest: the token that a greedy sampler picks, if it is known.
            stop_tokens: token ids that end an answer.

        Raises:
            DeltaMemError: the logits contain NaN or infinity.
        """
        row = self.row
        if likeliest is None or not row.sampler.is_greedy:
            likeliest = row.sampler.pick(logits)
        row.take(likeliest, stop_tokens)
        if len(row.tokens) <= row.prompt + 1:
            self._first_token = time.monotonic()
        return row.is_generating

    def completion(self, memory: StoredMemory) -> Completion:
        """Return the completion of the answer, with the memory after it."""
        now, submitted = time.monotonic(), self.ticket.submitted
        return Completion(
            answer=self.row.answer,
            pending=tuple(self.row.tokens[self.row.fed :]),
            memory=memory,
            prompt_tokens=self.row.prompt,
            cached_tokens=self.cached,
            waited=self._started - submitted,
            first_token=self._first_token - submitted,
            seconds=now - submitted,
        )
