"""A measurement as tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from deltamem_tool.bench import BASE, LORA, MEMORY, ONNX, PYTORCH
from deltamem_tool.bench.result import DECODE, FIRST, PEAK, PREFILL, Bench, Figure
from deltamem_tool.bench.setting import name_of
from deltamem_tool.onnx.export.targets import NO_QUANTIZATION

_RUNTIMES = {PYTORCH: "PyTorch", ONNX: "ONNX\nRuntime"}
_MODELS = {BASE: "base", MEMORY: "memory", LORA: "LoRA"}
# Heading, unit, and what one of the result's units is in it.
_COLUMNS = {
    PREFILL: ("prefill", "tokens/s", 1.0),
    FIRST: ("first token", "ms", 1e3),
    DECODE: ("decode", "tokens/s", 1.0),
    PEAK: ("peak memory", "MB", 1e-6),
}


def cost_table(found: Bench, prompt: int) -> Table:
    """A row a model and runtime: medians with their quartiles, and below them ratios to the base with their range."""
    setting = found.setting
    batch = "" if setting.batch_size == 1 else f", {setting.batch_size} at once"
    table = Table(title=f"{prompt} tokens of prompt, {setting.decode} decoded{batch}", show_lines=True)
    table.add_column("")
    shown = [what for what in _COLUMNS if what != PEAK or found.peaks]
    for what in shown:
        heading, unit, _ = _COLUMNS[what]
        table.add_column(f"{heading}\n[dim]{unit}[/dim]", justify="right")
    for runtime, model in found.sides:
        figures = found.figures(prompt, runtime, model)
        cells = [_cell(figures[what], _COLUMNS[what][2]) for what in shown if what != PEAK]
        if found.peaks:
            cells.append(_peak_cell(figures[PEAK], found.peaks[name_of(runtime, model)].imports))
        table.add_row(f"{_RUNTIMES[runtime]}\n[bold]{_MODELS[model]}[/bold]", *cells)
    return table


def _cell(figure: Figure, factor: float) -> str:
    value, ratio = figure.value, figure.ratio
    lines = [
        f"[bold]{_number(value.median * factor)}[/bold]",
        f"[dim]{_number(value.low * factor)}–{_number(value.high * factor)}[/dim]",
    ]
    if ratio is not None:
        lines.append(f"{ratio.median:.2f}× [dim]{ratio.low:.2f}–{ratio.high:.2f}[/dim]")
    return "\n".join(lines)


def _peak_cell(figure: Figure, imports: int) -> str:
    """It is measured once, so that there is no spread; below it what the libraries take."""
    factor = _COLUMNS[PEAK][2]
    lines = [f"[bold]{_number(figure.value.median * factor)}[/bold]", f"[dim]+ {_number(imports * factor)}[/dim]"]
    if figure.ratio is not None:
        lines.append(f"{figure.ratio.median:.2f}×")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def sentences(found: Bench) -> Iterator[str]:
    """What the table does not say: how to read it, sizes, and what it was taken on."""
    setting, about, sizes = found.setting, found.about, found.sizes
    yield (
        f"Medians of {setting.repeats} repeats and their quartiles; below them the ratio to the base in the same "
        "runtime, taken in every repeat: its median and range."
    )
    if found.peaks:
        yield "Peak memory: of a process that does nothing else; + what the libraries take before it loads anything."
    yield f"A memory file is {sizes.memory_file:,} bytes ({sizes.state:,} of state), however long the text was."
    held = [f"{count:,} ({count / sizes.memory_file:,.1f}× the file) of {n:,}" for n, count in sizes.cache.items()]
    yield f"Keys and values in context take, in bytes: {'; '.join(held)} tokens."
    if LORA in setting.models:
        whose = f"LoRA {setting.lora}" if setting.lora else "The LoRA is a fresh one with random weights on q and o"
        yield (
            f"{whose}: rank {about['lora_rank']}, not merged, {about['parameters'][LORA]:,} parameters; "
            f"the memory has {about['parameters'][MEMORY]:,}."
        )
    machine, packages = about["machine"], about["packages"]
    weights = (
        setting.dtype if about["quantize"] == NO_QUANTIZATION else f"{setting.dtype}, quantised {about['quantize']}"
    )
    where = ", ".join(part for part in (machine["gpu"], machine["cpu"]) if part)
    yield (
        f"{setting.adapter} on {about['base_model']}, {weights}, {setting.device} ({where}), threads: "
        f"{machine['threads']}, seed {setting.seed}."
    )
    yield f"{', '.join(f'{name} {number}' for name, number in packages.items())}."
