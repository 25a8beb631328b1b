"""Take measurements in turn, so that other work on the machine affects all of them alike."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.bench.sides import Side

T = TypeVar("T")


@dataclass(frozen=True)
class Rounds(Generic[T]):
    """What each name measured, one entry for each repeat, and the order within each repeat."""

    values: dict[str, list[T]]
    order: list[list[str]]


def in_turn(
    measurements: Mapping[str, Callable[[], T]],
    repeats: int,
    seed: int = 0,
    report: Callable[[str], object] = lambda name: None,
) -> Rounds[T]:
    """Take every measurement once in every repeat, in an order drawn anew, after a warm-up round that is not counted.

    Args:
        measurements: by name; each call returns what it measured.
        repeats: rounds that count.
        seed: of the order.
        report: called with the name of each measurement that begins.
    """
    draw = random.Random(seed)
    rounds: Rounds[T] = Rounds({name: [] for name in measurements}, [])
    for repeat in range(repeats + 1):
        order = list(measurements)
        draw.shuffle(order)
        for name in order:
            report(name)
            value = measurements[name]()
            if repeat:
                rounds.values[name].append(value)
        if repeat:
            rounds.order.append(order)
    return rounds


@dataclass(frozen=True)
class Seconds:
    """Durations of one visit: of the prompt's call, until the first token is chosen, and of all later tokens."""

    prefill: float
    first_token: float
    decode: float


def visit(side: Side, ids: NDArray[np.int64], decode: int, clock: Callable[[], float] = time.perf_counter) -> Seconds:
    """Run a prompt, int64 `[B, T]`, choose its first token, and decode further `decode` tokens greedily."""
    start = clock()
    logits, past = side.call(ids)
    prefilled = clock()
    token = side.choose(logits)
    first = clock()
    for _ in range(decode):
        logits, past = side.call(token, past)
        token = side.choose(logits)
    return Seconds(prefilled - start, first - start, clock() - first)


def cpu_name() -> str:
    """The processor's name as the operating system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
