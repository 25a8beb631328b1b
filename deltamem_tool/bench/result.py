"""The result of a benchmark: all durations, the figures computed from them, and their tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from rich.table import Table

from deltamem_tool._version import __version__
from deltamem_tool.bench import BASE, LORA, MEMORY, ONNX, PYTORCH
from deltamem_tool.bench.peak import Peak
from deltamem_tool.bench.setting import Setting, name_of
from deltamem_tool.bench.timing import Rounds, Seconds
from deltamem_tool.onnx.export.targets import NO_QUANTIZATION

FORMAT, FORMAT_VERSION = "deltamem-bench", 1
PREFILL, FIRST, DECODE, PEAK = (
    "prefill_tokens_per_second",
    "first_token_seconds",
    "decode_tokens_per_second",
    "peak_bytes",
)
_RUNTIMES = {PYTORCH: "PyTorch", ONNX: "ONNX\nRuntime"}
_MODELS = {BASE: "base", MEMORY: "memory", LORA: "LoRA"}
# Heading, unit, and the factor that converts a figure to this unit.
_COLUMNS = {
    PREFILL: ("prefill", "tokens/s", 1.0),
    FIRST: ("first token", "ms", 1e3),
    DECODE: ("decode", "tokens/s", 1.0),
    PEAK: ("peak memory", "MB", 1e-6),
}


@dataclass(frozen=True)
class Spread:
    """A median with its range: the quartiles for values, the minimum and maximum for ratios."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """A value, and its ratio to that of the base model in the same runtime, computed in each repeat.

    The ratio is None for the base model itself, and if its value is zero.
    """

    value: Spread
    ratio: Spread | None


@dataclass(frozen=True)
class Sizes:
    """Sizes for one conversation, in bytes.

    Args:
        memory_file: size of a memory file.
        state: size of the states in it.
        cache: size of the base model's keys and values, by the prompt's number of tokens.
    """

    memory_file: int
    state: int
    cache: dict[int, int]


@dataclass(frozen=True)
class BenchResult:
    """The result of `bench`.

    Args:
        setting: the setting of the benchmark.
        about: description of the models, the machine and the packages.
        rounds: durations by prompt.
        peaks: peak memory by side; empty if it was not measured.
        sizes: sizes of a memory file and of the cache.
    """

    setting: Setting
    about: dict[str, Any]
    rounds: dict[int, Rounds[Seconds]]
    peaks: dict[str, Peak]
    sizes: Sizes

    def _values(self, prompt: int, side: str) -> dict[str, list[float]]:
        """Return the values of each figure, one per repeat."""
        batch, visits = self.setting.batch_size, self.rounds[prompt].values[side]
        values = {
            PREFILL: [batch * prompt / seconds.prefill for seconds in visits],
            FIRST: [seconds.first_token for seconds in visits],
            DECODE: [batch * self.setting.decode / seconds.decode for seconds in visits],
        }
        if self.peaks:
            values[PEAK] = [float(self.peaks[side].by_prompt[prompt])]
        return values

    def figures(self, prompt: int, runtime: str, model: str) -> dict[str, Figure]:
        """Return the figures by name. `PEAK` is measured once, in bytes beyond the memory of the libraries.

        A tiny base model may need no memory beyond that. The peak then has no ratio.
        """
        base = self._values(prompt, name_of(runtime, BASE))
        figures = {}
        for name, values in self._values(prompt, name_of(runtime, model)).items():
            ratio = None
            if model != BASE and all(base[name]):
                ratios = [a / b for a, b in zip(values, base[name], strict=True)]
                ratio = Spread(float(np.median(ratios)), min(ratios), max(ratios))
            figures[name] = Figure(quartiles(values), ratio)
        return figures

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints: settings, figures, and each repeat's durations in the order of measurement."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "deltamem_version": __version__,
            "setting": asdict(self.setting),
            **self.about,
            "sizes": asdict(self.sizes),
            "prompts": [self._prompt_json(prompt) for prompt in self.setting.prompts],
        }

    def _prompt_json(self, prompt: int) -> dict[str, Any]:
        rounds, sides = self.rounds[prompt], {}
        for runtime, model in self.setting.sides:
            name = name_of(runtime, model)
            figures = self.figures(prompt, runtime, model)
            sides[name] = {
                "figures": {key: asdict(figure) for key, figure in figures.items()},
                "seconds": {
                    field.name: [getattr(seconds, field.name) for seconds in rounds.values[name]]
                    for field in fields(Seconds)
                },
            }
            if self.peaks:
                sides[name]["imports_bytes"] = self.peaks[name].imports
        return {"tokens": prompt, "order": rounds.order, "sides": sides}

    def table(self, prompt: int) -> Table:
        """Return a table with a row per model and runtime: medians and quartiles, and below them ratios and ranges."""
        setting = self.setting
        batch = "" if setting.batch_size == 1 else f", {setting.batch_size} at once"
        table = Table(title=f"{prompt} tokens of prompt, {setting.decode} decoded{batch}", show_lines=True)
        table.add_column("")
        columns = {name: column for name, column in _COLUMNS.items() if name != PEAK or self.peaks}
        for heading, unit, _ in columns.values():
            table.add_column(f"{heading}\n[dim]{unit}[/dim]", justify="right")
        for runtime, model in setting.sides:
            figures, cells = self.figures(prompt, runtime, model), []
            for name, (_, _, factor) in columns.items():
                # The peak is measured once, so the memory of the libraries is below it instead of a range.
                imports = self.peaks[name_of(runtime, model)].imports if name == PEAK else None
                cells.append(_cell(figures[name], factor, imports))
            table.add_row(f"{_RUNTIMES[runtime]}\n[bold]{_MODELS[model]}[/bold]", *cells)
        return table

    def sentences(self) -> Iterator[str]:
        """Yield notes: how to read the tables, the sizes, the models and the machine."""
        setting, about, sizes = self.setting, self.about, self.sizes
        yield (
            f"Medians and quartiles of {setting.repeats} repeats. Below them: the ratio to the base model in the same "
            "runtime, computed in every repeat, as median and range."
        )
        if self.peaks:
            yield (
                "Peak memory is that of a separate process; + is the memory of the libraries before anything is loaded."
            )
        yield f"A memory file has {sizes.memory_file:,} bytes ({sizes.state:,} of state), however long the text was."
        caches = [
            f"{count:,} ({count / sizes.memory_file:,.1f}× the file) of {tokens:,}"
            for tokens, count in sizes.cache.items()
        ]
        yield f"Keys and values in context take, in bytes: {'; '.join(caches)} tokens."
        if LORA in setting.models:
            lora = f"LoRA {setting.lora}" if setting.lora else "The LoRA has random weights on q and o"
            yield (
                f"{lora}: rank {about['lora_rank']}, not merged, {about['parameters'][LORA]:,} parameters; "
                f"the memory has {about['parameters'][MEMORY]:,}."
            )
        machine, quantize = about["machine"], about["quantize"]
        weights = f"{setting.dtype}{'' if quantize == NO_QUANTIZATION else f', quantised {quantize}'}"
        processors = ", ".join(part for part in (machine["gpu"], machine["cpu"]) if part)
        yield (
            f"{setting.adapter} on {about['base_model']}, {weights}, {setting.device} ({processors}), threads: "
            f"{machine['threads']}, seed {setting.seed}."
        )
        yield f"{', '.join(f'{name} {version}' for name, version in about['packages'].items())}."


def quartiles(values: Sequence[float]) -> Spread:
    """Return the median and the first and third quartile of `values`."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return Spread(float(median), float(low), float(high))


def _cell(figure: Figure, factor: float, imports: int | None) -> str:
    value, ratio = figure.value, figure.ratio
    spread = (
        f"{_number(value.low * factor)}–{_number(value.high * factor)}"
        if imports is None
        else f"+ {_number(imports * factor)}"
    )
    lines = [f"[bold]{_number(value.median * factor)}[/bold]", f"[dim]{spread}[/dim]"]
    if ratio is not None:
        span = f" [dim]{ratio.low:.2f}–{ratio.high:.2f}[/dim]" if imports is None else ""
        lines.append(f"{ratio.median:.2f}×{span}")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Format a number with at least three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
