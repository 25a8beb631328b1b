"""What a measurement found: every second that was taken, what they come to, and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deltamem_tool._version import __version__
from deltamem_tool.bench import BASE
from deltamem_tool.bench.peak import Peak
from deltamem_tool.bench.setting import Setting, name_of
from deltamem_tool.bench.timing import Seconds, Timed

FORMAT, FORMAT_VERSION = "deltamem-bench", 1
PREFILL, FIRST, DECODE, PEAK = (
    "prefill_tokens_per_second",
    "first_token_seconds",
    "decode_tokens_per_second",
    "peak_bytes",
)


@dataclass(frozen=True)
class Spread:
    """A median and what lies around it: of values the quartiles, of ratios all of them."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """A value and its ratio to the base's in the same runtime, taken in each repeat; None of the base itself, or to a
    zero."""

    value: Spread
    ratio: Spread | None


@dataclass(frozen=True)
class Sizes:
    """Bytes of one conversation.

    memory_file: a memory file's, on disk.
    state: of the numbers in it.
    cache: keys and values of a prompt in the base model, by its number of tokens: what the same text takes in context.
    """

    memory_file: int
    state: int
    cache: dict[int, int]


@dataclass(frozen=True)
class Bench:
    """All of it. `timed` is by prompt; `peaks` by side, and empty where nobody asked."""

    setting: Setting
    about: dict[str, Any]  # the models, the machine, the packages
    timed: dict[int, Timed]
    peaks: dict[str, Peak]
    sizes: Sizes

    @property
    def sides(self) -> list[tuple[str, str]]:
        """(runtime, model)."""
        return [(runtime, model) for runtime in self.setting.runtimes for model in self.setting.models]

    def values(self, prompt: int, runtime: str, model: str) -> dict[str, list[float]]:
        """An entry a repeat."""
        batch, taken = self.setting.batch_size, self.timed[prompt].seconds[name_of(runtime, model)]

        def rates(tokens: int, seconds: Sequence[float]) -> list[float]:
            return [batch * tokens / each for each in seconds]

        return {
            PREFILL: rates(prompt, [each.prefill for each in taken]),
            FIRST: [each.first_token for each in taken],
            DECODE: rates(self.setting.decode, [each.decode for each in taken]),
        }

    def figures(self, prompt: int, runtime: str, model: str) -> dict[str, Figure]:
        """By what is measured; `PEAK`, which is measured once, in bytes beyond what the libraries take. A tiny base may
        take none beyond it, and nothing has a ratio to that."""
        own, base = (self.values(prompt, runtime, name) for name in (model, BASE))
        if self.peaks:
            peaks = [self.peaks[name_of(runtime, name)].by_prompt[prompt] for name in (model, BASE)]
            own[PEAK], base[PEAK] = ([float(peak)] for peak in peaks)
        found = {}
        for what, values in own.items():
            ratio = None
            if model != BASE and all(base[what]):
                ratios = [a / b for a, b in zip(values, base[what], strict=True)]
                ratio = Spread(float(np.median(ratios)), min(ratios), max(ratios))
            found[what] = Figure(quartiles(values), ratio)
        return found

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints: settings, figures, and each repeat's seconds in the order that they were taken in."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "deltamem_version": __version__,
            "setting": asdict(self.setting),
            **self.about,
            "sizes": asdict(self.sizes),
            "prompts": [self._of_prompt(prompt) for prompt in self.setting.prompts],
        }

    def _of_prompt(self, prompt: int) -> dict[str, Any]:
        timed, sides = self.timed[prompt], {}
        for runtime, model in self.sides:
            name = name_of(runtime, model)
            figures = self.figures(prompt, runtime, model)
            sides[name] = {
                "figures": {what: asdict(figure) for what, figure in figures.items()},
                "seconds": _columns(timed.seconds[name]),
            }
            if self.peaks:
                sides[name]["imports_bytes"] = self.peaks[name].imports
        return {"tokens": prompt, "order": timed.order, "sides": sides}


def quartiles(values: Sequence[float]) -> Spread:
    low, median, high = np.percentile(values, (25, 50, 75))
    return Spread(float(median), float(low), float(high))


def _columns(taken: Sequence[Seconds]) -> dict[str, list[float]]:
    return {name: [getattr(each, name) for each in taken] for name in Seconds.__dataclass_fields__}
