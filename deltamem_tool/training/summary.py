"""Write down how an adapter was trained, as JSON and as a plot, in the adapter folder."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltamem_tool.adapter.config_file import PLOT_FILE, SUMMARY_FILE
from deltamem_tool.recipe.load import Recipe
from deltamem_tool.training.run_folder import DATA_FILES, flat_options
from deltamem_tool.training.sharding import BaseShare

_CONDITIONS = {"": "the state", "_zero": "zeros", "_donor": "another's state"}
_COLOURS = {"": "#0b6e4f", "_zero": "#d9a404", "_donor": "#c8553d"}


@dataclass(frozen=True)
class TrainingSummary:
    """A summary of how an adapter was trained, without local paths."""

    recipe: dict[str, Any]  # by dotted key
    steps: int
    best_step: int | None  # that the weights are of, where there was an evaluation
    seconds: float  # since it was started, or last resumed
    processes: int
    device: str
    parameters: int
    episodes: dict[str, Any] | None  # statistics of the data
    skipped_rows: int
    log: list[dict[str, float]] = field(repr=False)  # of the Trainer, a row an entry
    shard: BaseShare | None = None  # what each process held of a base that they shared
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, mean cross-entropy of the answers since the previous entry), without the other terms of the loss."""
        return [(int(row["step"]), row["answer"]) for row in self.log if "answer" in row]

    def files(self) -> dict[str, bytes]:
        """Return the files to put into the adapter folder."""
        text = json.dumps(_plain(asdict(self)), indent=1, allow_nan=False) + "\n"
        return {SUMMARY_FILE: text.encode(), PLOT_FILE: plot(self.log)}


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def named_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's options by dotted key. Local paths are shortened to their last part."""
    options: dict[str, Any] = dict(flat_options(recipe))
    for key in ("base", "adapter", *DATA_FILES):
        value = options.get(key)
        if isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists()):
            options[key] = Path(value).name
    return options


def plot(log: Sequence[dict[str, float]]) -> bytes:
    """Plot loss, evaluations and mean gate over the steps, as PNG."""
    figure = Figure(figsize=(7.0, 6.0))
    # Said here: matplotlib's own layouts draw everything once more to find it.
    figure.subplots_adjust(left=0.11, bottom=0.08, right=0.98, top=0.98, hspace=0.06)
    FigureCanvasAgg(figure)
    evaluated = [row for row in log if "eval_loss" in row]
    trained = [row for row in log if "answer" in row]
    gates = [(row["step"], row["gates"]) for row in trained if "gates" in row]  # a LoRA has none, and no state
    axes = figure.subplots(2 if gates else 1, sharex=True, squeeze=False, height_ratios=(2, 1)[: 2 if gates else 1])
    loss = axes[0, 0]
    steps = [row["step"] for row in trained]
    loss.plot(steps, [row["answer"] for row in trained], color="#9bbfb1", label="training")
    for suffix, name in _CONDITIONS.items():
        if evaluated and f"eval_loss{suffix}" in evaluated[0]:
            values = [row[f"eval_loss{suffix}"] for row in evaluated]
            loss.plot([row["step"] for row in evaluated], values, ".-", color=_COLOURS[suffix], label=f"with {name}")
    loss.set(ylabel="cross-entropy of the answers", ylim=(0, None))
    loss.legend(fontsize=8)
    if gates:
        axes[1, 0].plot([step for step, _ in gates], [gate for _, gate in gates], color="#7b6db5")
        axes[1, 0].set(ylabel="mean β of what is written", ylim=(0, 1))
    axes[-1, 0].set(xlabel="step")
    for one in axes.flat:
        one.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120, metadata={"Software": None})
    return drawn.getvalue()
