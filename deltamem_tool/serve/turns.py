"""Answer one turn: find the memory and the new messages, generate, and store the memory before the answer ends."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from anyio.to_thread import run_sync

from deltamem_tool.chat.engine import Engine, empty_memory
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.memory.file import StoredMemory, check_memory, memory_bytes, memory_from_bytes
from deltamem_tool.segments.messages import Message
from deltamem_tool.serve.batching.job import Completion, Job
from deltamem_tool.serve.batching.scheduler import Scheduler
from deltamem_tool.serve.errors import RequestError
from deltamem_tool.serve.locks import MemoryLocks
from deltamem_tool.serve.message_history import MessageHistory
from deltamem_tool.serve.metrics import Metrics
from deltamem_tool.serve.prompt import Prompt, PromptRequest, build_prompt
from deltamem_tool.serve.store import MemoryStore, StoredResponse

RESPONSE_PREFIX = "resp_"
RESPONSE_SECONDS = 30 * 24 * 3600.0  # how long a response can be continued from


@dataclass(frozen=True)
class RequestMemory:
    """The memory of a request.

    Args:
        tenant: tenant of the API key.
        id: name of the memory; None for one that starts from zeros and is not kept.
        write: whether the memory changes.
        source: memory or response to start from, if the memory does not exist yet.
        expires_in: seconds until the memory expires; None leaves its expiry unchanged.
    """

    tenant: str
    id: str | None = None
    write: bool = True
    source: str | None = None
    expires_in: float | None = None


class KeptResponse(NamedTuple):
    """A response to keep: its name, and its JSON when the turn has ended."""

    id: str
    response: Callable[[Outcome], dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """A request from a client.

    Args:
        memory: the memory.
        messages: all messages of the conversation that the client sends.
        sampling: options for the answer.
        previous: response whose conversation these messages continue.
        keep: the response, if others may continue from it; None if it is not kept.
        instructions: system message for this turn only, which is not kept.
        streamed: whether the answer is sent in pieces.
        key: idempotency key, equal when the request is sent again; None if the client sends none.
    """

    memory: RequestMemory
    messages: Sequence[Message]
    sampling: Sampling
    previous: str | None = None
    keep: KeptResponse | None = None
    instructions: str | None = None
    streamed: bool = True
    key: str | None = None

    @property
    def names(self) -> frozenset[str]:
        """The memories and responses that the request involves."""
        kept = None if self.keep is None else self.keep.id
        names = (self.memory.id, self.memory.source, self.previous, kept)
        return frozenset(name for name in names if name is not None)


@dataclass(frozen=True)
class Outcome:
    """The end of a turn, whose memory is stored.

    Args:
        completion: the answer.
        version: version of the memory; None if it is not kept.
        prompt: the context that was fed.
        memory: the memory.
    """

    completion: Completion
    version: int | None
    prompt: Prompt
    memory: RequestMemory

    @property
    def report(self) -> dict[str, Any]:
        """What the client is told about its memory."""
        return {
            "memory": self.memory.id,
            "version": self.version,
            "messages_written": self.prompt.written,
            "answer_written": self.prompt.answer_writes,
            "messages_dropped": self.prompt.dropped,
        }


@dataclass(frozen=True)
class _Start:
    """The starting point of a turn.

    Args:
        memory: memory to start from.
        history: history of the messages that it was fed.
        version: version of the stored memory; None if there is none.
        expires_at: expiry of the stored memory.
        earlier: messages before those of the request.
        origin: id and version of the stored memory that a turn without a stored memory of its own starts from, perhaps
            by way of other responses; None if there is none.
    """

    memory: StoredMemory
    history: MessageHistory
    version: int | None = None
    expires_at: float | None = None
    earlier: tuple[Message, ...] = ()
    origin: tuple[str, int] | None = None


class Turns:
    """Answers requests, each from its memory.

    Args:
        scheduler: runs the model.
        store: holds the memories.
        locks: locks of the memories.
        metrics: counters.
        window: maximum number of tokens in a context; None for as many as the model supports.
        seconds: time limit for a request, in seconds.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        store: MemoryStore,
        locks: MemoryLocks,
        metrics: Metrics,
        window: int | None,
        seconds: float,
    ) -> None:
        self.engine: Engine = scheduler.engine
        self._scheduler, self._store, self._locks, self._metrics = scheduler, store, locks, metrics
        self.window = self.engine.max_length if window is None else window
        self._seconds = seconds

    async def answer(self, request: Request) -> AsyncGenerator[str | Outcome, None]:
        """Yield the answer, in pieces if it is streamed, and then the outcome, when the memory is stored.

        To stop early, close the generator. Nothing is kept in that case.

        Raises:
            DeltaMemError: the request cannot be answered; nothing of it is kept.
        """
        request_memory, deadline = request.memory, time.monotonic() + self._seconds
        async with self._lock(request_memory):
            start, prompt_request, prompt = await run_sync(self._prepare, request)
            job = Job(
                request_memory.tenant,
                prompt.memory,
                prompt.tokens,
                _limit_length(request.sampling, prompt.room),
                prompt.answer_writes,
                deadline,
                prefix_key=request_memory.tenant,
                names=request.names,
                streamed=request.streamed,
            )
            ticket = self._scheduler.submit(job)
            try:
                async for event in ticket:
                    if isinstance(event, str):
                        yield event
                    else:
                        outcome = await run_sync(self._commit, request, start, prompt_request, prompt, event)
                        yield outcome
            finally:
                ticket.cancel()

    def _lock(self, request_memory: RequestMemory) -> AbstractAsyncContextManager[None]:
        """Return the lock of the memory, if the request changes one."""
        if request_memory.id is None or not request_memory.write:
            return nullcontext()
        return self._locks.hold(request_memory.tenant, request_memory.id)

    def _start(self, request: Request) -> _Start:
        request_memory = request.memory
        with self._metrics.store("get"):
            stored = None if request_memory.id is None else self._store.get(request_memory.tenant, request_memory.id)
        snapshot = None if request.previous is None else self._response(request_memory.tenant, request.previous)
        earlier = () if snapshot is None else tuple(snapshot.transcript["messages"])
        if stored is not None:
            memory, history = self._read(stored.data, request_memory.id), MessageHistory.from_json(stored.turn)
            return _Start(memory, history, stored.version, stored.expires_at, earlier)
        if snapshot is not None:
            return replace(self._from_response(snapshot), earlier=earlier)
        if request_memory.source is not None:
            return self._seed(request_memory.tenant, request_memory.source)
        return _Start(empty_memory(self.engine), MessageHistory.empty())

    def _seed(self, tenant: str, source: str) -> _Start:
        if source.startswith(RESPONSE_PREFIX):
            return self._from_response(self._response(tenant, source))
        stored = self._store.get(tenant, source)
        if stored is None:
            raise RequestError(
                f"There is no memory {source!r}.", "", "Correct memory.from.", status=404, code="memory_not_found",
                param="memory.from",
            )  # fmt: skip
        history = MessageHistory.from_json(stored.turn)
        return _Start(self._read(stored.data, source), history, origin=(source, stored.version))

    def _from_response(self, snapshot: StoredResponse) -> _Start:
        origin = None if snapshot.memory is None else (snapshot.memory, snapshot.transcript["version"])
        history = MessageHistory.from_json(snapshot.transcript["fed"])
        return _Start(self._read(snapshot.data, snapshot.id), history, origin=origin)

    def _response(self, tenant: str, id: str) -> StoredResponse:
        snapshot = self._store.get_response(tenant, id)
        if snapshot is None:
            raise RequestError(
                f"Previous response with id {id!r} not found.",
                "It was not stored, was deleted, or has expired.",
                "Send the whole conversation.",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        return snapshot

    def _read(self, data: bytes, name: str | None) -> StoredMemory:
        memory = memory_from_bytes(data, f"The memory {name!r}")
        check_memory(memory.shape, memory.adapter, self.engine.memory_shape, self.engine.adapter)
        return memory

    def _prepare(self, request: Request) -> tuple[_Start, PromptRequest, Prompt]:
        """Return the starting point of the turn, and the prompt."""
        start = self._start(request)
        messages = [*start.earlier, *request.messages]
        if request.instructions is not None:
            messages = [{"role": "system", "content": request.instructions}, *messages]
        known = start.history.match(messages, request.key)
        pending = 0 if known.talk is None else start.history.talks[known.talk].pending
        prompt_request = PromptRequest(messages, known, pending, request.memory.write, request.sampling.max_new_tokens)
        return start, prompt_request, build_prompt(self.engine, start.memory, prompt_request, self.window)

    def _commit(
        self,
        request: Request,
        start: _Start,
        prompt_request: PromptRequest,
        prompt: Prompt,
        completion: Completion,
    ) -> Outcome:
        request_memory, history, version = request.memory, start.history, start.version
        if prompt.answer_writes:
            pending = len(completion.pending)
            history = history.with_turn(
                prompt_request.known, prompt_request.messages, completion.answer.text, pending, request.key
            )
        data = memory_bytes(completion.memory)
        if request_memory.id is not None and prompt.answer_writes:
            expires_at = (
                start.expires_at if request_memory.expires_in is None else time.time() + request_memory.expires_in
            )
            with self._metrics.store("put"):
                put = self._store.put(
                    request_memory.tenant, request_memory.id, data, start.version, history.as_json(), expires_at
                )
            version = put.version
        outcome = Outcome(completion, version, prompt, request_memory)
        if request.keep is not None:
            response = request.keep.response(outcome)
            answer = {"role": "assistant", "content": completion.answer.text}
            messages = [*start.earlier, *request.messages, answer]
            origin = start.origin if request_memory.id is None or version is None else (request_memory.id, version)
            version = None if origin is None else origin[1]
            transcript = {"messages": messages, "fed": history.as_json(), "response": response, "version": version}
            expires_at = time.time() + RESPONSE_SECONDS
            self._store.put_response(request_memory.tenant, request.keep.id, data, transcript, origin, expires_at)
        self._metrics.count_completion(completion)
        return outcome


def _limit_length(sampling: Sampling, room: int | None) -> Sampling:
    return sampling if room is None else replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
