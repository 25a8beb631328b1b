"""Show an evaluation as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from deltamem_tool.evaluation.conditions import readable_name
from deltamem_tool.evaluation.report.drawing import losses_figure, scores_figure
from deltamem_tool.evaluation.result import Evaluation
from deltamem_tool.evaluation.scoring.digits import mean_and_interval
from deltamem_tool.evaluation.scoring.scales import LOG_PROB, PERPLEXITY, perplexity
from deltamem_tool.evaluation.scoring.statistics import Estimate
from deltamem_tool.io.pictures import write_picture

_DPI = 140


def score_table(evaluation: Evaluation, metric: str | None = None) -> Table:
    """Return a table of one metric, by default the first, with one row per condition and one column per group."""
    metric = metric or evaluation.metrics[0]
    counts = {
        group: len(evaluation.scores(metric, evaluation.conditions[0].name, group)[0]) for group in evaluation.groups
    }
    table = Table(
        title=f"{escape(evaluation.task)}, protocol {evaluation.protocol}: {readable_name(metric)}, 95 % interval"
    )
    table.add_column("", style="bold", overflow="fold")
    for group in evaluation.groups:
        # Fold, so that numbers stay complete if many groups share a narrow screen.
        table.add_column(f"{escape(group)}\n[dim]{counts[group]}[/dim]", justify="right", overflow="fold")
    for condition in evaluation.conditions:
        estimates = [evaluation.estimate(metric, condition.name, group) for group in evaluation.groups]
        table.add_row(escape(readable_name(condition.name)), *(_cell(metric, one) for one in estimates))
    return table


def _cell(metric: str, estimate: Estimate) -> str:
    mean, interval = mean_and_interval(estimate.mean, estimate.low, estimate.high)
    text = f"{mean}\n[dim]{interval}[/dim]"
    if metric != LOG_PROB:
        return text
    mean, interval = mean_and_interval(*map(perplexity, (estimate.mean, estimate.high, estimate.low)))
    return f"{text}\n{PERPLEXITY} {mean}\n[dim]{interval}[/dim]"


def plot_scores(evaluation: Evaluation, path: Path) -> None:
    """Plot the first metric by group, in the format given by the extension of `path`."""
    metric, rows = evaluation.metrics[0], {}
    for condition in evaluation.conditions:
        estimates = [evaluation.estimate(metric, condition.name, group) for group in evaluation.groups]
        rows[condition.name] = [(one.mean, one.low, one.high) for one in estimates]
    title = f"{evaluation.task}, protocol {evaluation.protocol}"
    write_picture(scores_figure(metric, evaluation.groups, rows, title), path, _DPI)


def plot_losses(losses: Sequence[tuple[int, float]], path: Path) -> None:
    """Plot (step, loss) pairs, in the format given by the extension of `path`."""
    write_picture(losses_figure(losses), path, _DPI)
