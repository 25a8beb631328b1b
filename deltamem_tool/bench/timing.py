"""Sides timed in turn, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from numpy.typing import NDArray

from deltamem_tool.bench.sides import Side

Clock = Callable[[], float]


@dataclass(frozen=True)
class Seconds:
    """Of one visit: a call over the prompt, that and the choice of a first token, and all later tokens one by one."""

    prefill: float
    first_token: float
    decode: float


def visit(side: Side, ids: NDArray, decode: int, clock: Clock = time.perf_counter) -> Seconds:
    """A prompt, int64 `[B, T]`, its first token, and `decode` calls with the token before."""
    start = clock()
    logits, past = side.call(ids)
    prefilled = clock()
    token = side.choose(logits)
    first = clock()
    for _ in range(decode):
        logits, past = side.call(token, past)
        token = side.choose(logits)
    return Seconds(prefilled - start, first - start, clock() - first)


@dataclass(frozen=True)
class Timed:
    """What was taken of each side, an entry a repeat, and in which order."""

    seconds: dict[str, list[Seconds]]
    order: list[list[str]]


def interleaved(
    sides: Mapping[str, Side],
    ids: NDArray,
    decode: int,
    repeats: int,
    seed: int,
    report: Callable[[str], object] = lambda name: None,
    clock: Clock = time.perf_counter,
) -> Timed:
    """Visit every side `repeats` times: once each in every repeat, in an order drawn anew, after a round that is not
    counted and warms up. `report` is told whose visit begins."""
    draw = random.Random(seed)
    timed = Timed({name: [] for name in sides}, [])
    for repeat in range(repeats + 1):
        order = list(sides)
        draw.shuffle(order)
        for name in order:
            report(name)
            took = visit(sides[name], ids, decode, clock)
            if repeat:
                timed.seconds[name].append(took)
        if repeat:
            timed.order.append(order)
    return timed
