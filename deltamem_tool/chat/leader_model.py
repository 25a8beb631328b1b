"""Conversations on a base model whose weights several processes share: the first process leads, the others follow.

The first process chats, samples tokens and writes files. Every call of the model needs all processes, because each of
them holds a part of every past. So the first process sends its calls to the others, which make the same calls in the
same order and do nothing else.
"""

from __future__ import annotations

import signal
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch.distributed as dist
from numpy.typing import NDArray

from deltamem_tool.base_model.launch import PATIENCE, members, report_lost_processes
from deltamem_tool.chat.group import Group, PaddedGroup
from deltamem_tool.chat.torch_engine import TorchModel, TorchPast
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.memory.file import StoredMemory

ADVICE = "Start all of them again. A memory file contains what was said until then."


@dataclass(frozen=True)
class _Place:
    """Stands for a past in what is told: each process has its own part of it."""

    number: int


@dataclass(frozen=True)
class _Call:
    """A call of a method that returns a past, last or alone."""

    method: str
    arguments: tuple[Any, ...]
    number: int  # of the past that comes of it
    dropped: Sequence[int]  # pasts that nobody has any more


class _SharedPast:
    """A past of all processes; it has the part of this one."""

    def __init__(self, number: int, part: TorchPast) -> None:
        self.number, self.part = number, part


class LeaderModel:
    """The `Engine` of the first process. Meanwhile, all other processes run `follow_leader`.

    Args:
        model: model of this process. All processes must create theirs, with this class or with `follow_leader`, at the
            same time.
    """

    def __init__(self, model: TorchModel) -> None:
        self.text, self.stop_tokens, self.max_length = model.text, model.stop_tokens, model.max_length
        self.adapter, self.mechanism, self.memory_shape = model.adapter, model.mechanism, model.memory_shape
        self.takes_back = model.takes_back
        self._model = model
        self._channel = _Channel()
        self._numbers = count()
        self._dropped: deque[int] = deque()
        self._is_broken = False
        # All is told and done in one thread: in one order, whoever asks, and whole, whatever interrupts who asks.
        self._thread = ThreadPoolExecutor(1, "leader-model")

    def start(self, memory: StoredMemory) -> _SharedPast:
        """See `Engine.start`."""
        return self._past_of("start", memory)

    def step(
        self,
        past: _SharedPast,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        write_mask: NDArray[Any],
        segment_end: NDArray[Any] | None = None,
        all_positions: bool = False,
    ) -> tuple[NDArray[Any], _SharedPast]:
        """See `Engine.step`."""
        arguments = (past, input_ids, attention_mask, write_mask, segment_end, all_positions)
        logits, after = self._call_everywhere("step", *arguments)
        return logits, after

    def memory(self, past: _SharedPast) -> StoredMemory:
        """See `Engine.memory`; it is the same in every process."""
        return self._model.memory(past.part)

    def with_memory(self, past: _SharedPast, memory: StoredMemory) -> _SharedPast:
        """See `Engine.with_memory`."""
        return self._past_of("with_memory", past, memory)

    def take(self, past: _SharedPast, row: int, columns: NDArray[Any]) -> _SharedPast:
        """See `Engine.take`."""
        return self._past_of("take", past, row, columns)

    def keep(self, past: _SharedPast, columns: Mapping[int, NDArray[Any]]) -> _SharedPast:
        """See `Engine.keep`."""
        return self._past_of("keep", past, columns)

    def join(self, pasts: Sequence[_SharedPast]) -> _SharedPast:
        """See `Engine.join`."""
        return self._past_of("join", list(pasts))

    def size(self, past: _SharedPast) -> int:
        """See `Engine.size`; of the part of this process."""
        return self._model.size(past.part)

    def group(self) -> Group:
        """See `Engine.group`."""
        return PaddedGroup(self)

    def close(self) -> None:
        """Release the other processes."""
        if not self._is_broken:
            self._thread.submit(self._channel.send, None).result()
        self._thread.shutdown()

    def _past_of(self, method: str, *arguments: Any) -> _SharedPast:
        past: _SharedPast = self._call_everywhere(method, *arguments)[-1]
        return past

    def _call_everywhere(self, method: str, *arguments: Any) -> tuple[Any, ...]:
        return self._thread.submit(self._call, method, arguments).result()

    def _call(self, method: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._is_broken:
            raise DeltaMemError(
                "The processes of this run are no longer in step.", "An earlier call has failed in one of them.", ADVICE
            )
        number = next(self._numbers)
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        ordered = _with_pasts(arguments, _SharedPast, lambda past: _Place(past.number))
        local = _with_pasts(arguments, _SharedPast, lambda past: past.part)
        self._is_broken = True  # until it is known that the others have done the same
        with self._channel.report_lost_processes():
            self._channel.send(_Call(method, ordered, number, dropped))
            try:
                *results, part = _as_tuple(getattr(self._model, method)(*local))
            except DeltaMemError:  # about the arguments, which are those of all
                self._is_broken = False
                raise
        self._is_broken = False
        past = _SharedPast(number, part)
        weakref.finalize(past, self._dropped.append, number)
        return (*results, past)


def follow_leader(model: TorchModel) -> None:
    """Make the same calls as the `LeaderModel` of the first process, until it is closed.

    Signals that end a command are left to the first process, which may have to write something.

    Raises:
        DeltaMemError: the first process has ended without closing.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    channel, parts = _Channel(), dict[int, TorchPast]()
    with channel.report_lost_processes():
        while (order := channel.receive()) is not None:
            for number in order.dropped:
                del parts[number]
            arguments = _with_pasts(order.arguments, _Place, lambda place: parts[place.number])
            with suppress(DeltaMemError):  # the first process says what is wrong, and has no such past either
                parts[order.number] = _as_tuple(getattr(model, order.method)(*arguments))[-1]


class _Channel:
    """From the first process to all others; all have to make theirs together."""

    def __init__(self) -> None:
        # On the CPU, whatever the model runs on: who waits for a word there keeps no GPU busy.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._members = members()

    def send(self, order: _Call | None) -> None:
        dist.broadcast_object_list([order], src=0, group=self._group)

    def receive(self) -> _Call | None:
        orders: list[_Call | None] = [None]
        dist.broadcast_object_list(orders, src=0, group=self._group)
        return orders[0]

    def report_lost_processes(self) -> AbstractContextManager[None]:
        return report_lost_processes(self._members, ADVICE)


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _with_pasts(arguments: Sequence[Any], kind: type, replaced: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Replace every instance of `kind` in `arguments`, alone or in a list."""

    def each(value: Any) -> Any:
        if isinstance(value, kind):
            return replaced(value)
        return [each(item) for item in value] if isinstance(value, list) else value

    return tuple(map(each, arguments))
