"""Take measurements in turn, so that other work on the machine affects all of them equally."""

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
    """The results of each measurement, one per repeat, and the order within each repeat."""

    values: dict[str, list[T]]
    order: list[list[str]]


def interleave(
    measurements: Mapping[str, Callable[[], T]],
    repeats: int,
    seed: int = 0,
    report: Callable[[str], object] = lambda name: None,
) -> Rounds[T]:
    """Take every measurement once per repeat, in a new random order, after a warm-up round that does not count.

    Args:
        measurements: functions by name; each call returns its result.
        repeats: number of rounds that count.
        seed: random seed for the order.
        report: called with the name of a measurement when it begins.
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
    """Durations of one visit: until the prompt's call returns, until the first token, and of all later tokens."""

    prefill: float
    first_token: float
    decode: float


def time_generation(
    side: Side, ids: NDArray[np.int64], decode: int, clock: Callable[[], float] = time.perf_counter
) -> Seconds:
    """Run a prompt, int64 `[B, T]`, choose its first token, and decode `decode` further tokens greedily."""
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
    """Return the name of the processor, as reported by the operating system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
