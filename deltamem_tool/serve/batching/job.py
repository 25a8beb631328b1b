"""The jobs that a scheduler takes, and the events that it returns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from deltamem_tool.chat.engine import Engine
from deltamem_tool.chat.generation import Answer, Token
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.errors import ConfigError, DataError, DeltaMemError, MemoryStateError
from deltamem_tool.memory.file import StoredMemory, check_memory


class QueueFull(DeltaMemError):
    """Too many requests are waiting."""


class DeadlineExceeded(DeltaMemError):
    """A request was not answered in time; nothing of it is kept."""


class Cancelled(DeltaMemError):
    """A request was cancelled, or the scheduler was closed before it was answered; nothing of it is kept."""


@dataclass(frozen=True)
class Job:
    """A job for the scheduler.

    Args:
        tenant: tenant of the request. Tenants take turns when requests wait.
        memory: memory to start from, of one row.
        tokens: the whole context, and which of its tokens write.
        sampling: how the tokens of the answer are chosen, and when it ends.
        answer_writes: whether the tokens of the answer write.
        deadline: time after which the answer is useless, by `time.monotonic()`; None for never.
        prefix_key: jobs with the same key, memory and prefix share the computation of that prefix; None shares nothing.
        names: names of memories and responses. When one of them is forgotten, what was computed for the job is dropped.
        streamed: whether the reader gets the text in pieces. If not, it gets all of it at the end, which costs less.
    """

    tenant: str
    memory: StoredMemory
    tokens: tuple[Token, ...]
    sampling: Sampling = Sampling()  # noqa: RUF009  (frozen)
    answer_writes: bool = True
    deadline: float | None = None
    prefix_key: str | None = None
    names: frozenset[str] = frozenset()
    streamed: bool = True

    def check(self, engine: Engine, ids: Collection[int]) -> None:
        """Check that `engine`, whose token ids are `ids`, can run this job.

        Raises:
            MemoryStateError: the memory belongs to another adapter, does not have one row, or contains NaN or infinity.
            ConfigError: there are no tokens, or no room for an answer after them.
            DataError: a token id is unknown to the model.
        """
        check_memory(self.memory.shape, self.memory.adapter, engine.memory_shape, engine.adapter)
        for name, tensor in self.memory.tensors().items():
            if len(tensor) != 1:
                raise MemoryStateError(
                    "A request must start from a single memory.", f"This one has {len(tensor)} rows.", "Pick one row."
                )
            if not np.isfinite(tensor).all():
                raise MemoryStateError(
                    "The memory contains NaN or infinity.", f"It is in {name}.", "Start from an earlier version."
                )
        if not self.tokens:
            raise ConfigError("There is nothing to answer.", "The prompt has no tokens.", "Add some text.")
        if engine.max_length is not None and len(self.tokens) >= engine.max_length:
            raise ConfigError(
                f"The prompt does not fit into the window of {engine.max_length} tokens.",
                f"It has {len(self.tokens)} tokens, and the answer needs at least one.",
                "Shorten it.",
            )
        unknown = next((token.id for token in self.tokens if token.id not in ids), None)
        if unknown is not None:
            raise DataError(f"{unknown} is not a token of this model.", "", "Encode the text with its tokenizer.")


@dataclass(frozen=True)
class Completion:
    """The end of an answered job.

    Args:
        answer: its text, its tokens and why it ended.
        pending: tokens of the answer that were not fed, and have not written. This is the last token if the answer
            ended by its length, and never the token that ended it otherwise.
        memory: memory after all tokens that were fed.
        prompt_tokens: number of tokens in the job's context.
        cached_tokens: number of these that an earlier job had computed.
        waited: seconds in the queue.
        first_token: seconds until the first token of the answer, including the queue.
        seconds: total seconds.
    """

    answer: Answer
    pending: tuple[Token, ...]
    memory: StoredMemory
    prompt_tokens: int
    cached_tokens: int
    waited: float
    first_token: float
    seconds: float
