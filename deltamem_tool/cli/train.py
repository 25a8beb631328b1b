"""`deltamem train`: train an adapter from a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from deltamem_tool.cli.options import UserPath, json_option

if TYPE_CHECKING:
    from deltamem_tool.recipe.load import Recipe
    from deltamem_tool.training import BaseShare, DryRun


@click.command()
@click.argument("recipe", type=UserPath())
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe; repeatable.")
@click.option("--out", type=UserPath(), help="Adapter folder to write, instead of the recipe's.")
@click.option("--bptt", type=int, metavar="N", help="Backpropagate through only the last N chunks of the write pass.")
@click.option("--skip-bad-rows", is_flag=True, help="Skip rows that are not conversations, and count them.")
@click.option("--resume", is_flag=True, help="Resume from the last checkpoint of an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace the adapter folder if it exists.")
@click.option(
    "--dry-run", is_flag=True, help="Do not train; print the steps, the data and the memory that training takes."
)
@click.option(
    "--processes", type=click.IntRange(1), metavar="N", help="With --dry-run: print what each of N processes needs."
)
@json_option
def command(
    recipe: str,
    changes: tuple[str, ...],
    out: str | None,
    bptt: int | None,
    skip_bad_rows: bool,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    processes: int | None,
    as_json: bool,
) -> None:
    """Train an adapter as described in RECIPE, a YAML file. Only the adapter's weights are trained.

    To train on several GPUs, run torchrun --nproc-per-node 8 -m deltamem_tool train RECIPE. If the base model does not
    fit on one of them, add --set training.shard=fsdp2.

    --dry-run needs only the base model's config to compute parameters and memory, and its tokenizer for the rest.

    Example: deltamem train recipes/quickstart.yaml --set training.steps=100
    """
    from deltamem_tool.recipe.load import load_recipe

    if dry_run and (resume or overwrite):
        raise click.UsageError("--dry-run writes nothing: leave out --resume and --overwrite.")
    if processes is not None and not dry_run:
        raise click.UsageError("--processes is about a dry run; torchrun or accelerate launch starts processes.")
    settings = list(changes)
    if bptt is not None:
        settings.append(f"training.bptt={bptt}")
    if skip_bad_rows:
        settings.append("data.skip_bad_rows=true")
    chosen = load_recipe(recipe, settings, out)
    if dry_run:
        _dry_run(recipe, chosen, processes, as_json)
        return

    import datasets

    from deltamem_tool.cli.console import duration_text, progress
    from deltamem_tool.training import train

    datasets.disable_progress_bars()  # the command has its own
    with progress() as bar:
        task = bar.add_task("Training", total=chosen.training.steps, note="")

        def report(step: int, steps: int, loss: float | None) -> None:
            bar.update(task, completed=step, total=steps, note="" if loss is None else f"loss {loss:.3f}")

        def encoding(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of, note="episodes encoded")

        def expecting(steps: int, seconds: float) -> None:
            beside = "" if chosen.training.eval_every is None else ", without the evaluations"
            bar.console.print(f"{steps:,} steps: {duration_text(seconds)}{beside}.", highlight=False)

        def sharded(share: BaseShare) -> None:
            bar.console.print(
                f"Each of {share.processes} processes holds {_size(share.held)} of the base's {_size(share.total)}.",
                highlight=False,
            )

        result = train(chosen, resume, overwrite, report, encoding, expecting, sharded)
    if not result.is_main:
        return
    if as_json:
        click.echo(json.dumps({**asdict(result), "adapter": str(result.adapter)}))
        return
    if result.skipped_rows:
        click.echo(f"{result.skipped_rows} bad rows were left out.")
    click.echo(f"{result.steps} steps in {result.seconds:.0f} s; {result.parameters:,} parameters in {result.adapter}.")
    click.echo(f"Loss {result.losses[0][1]:.3f} → {result.losses[-1][1]:.3f}.")
    if chosen.static:
        click.echo(f"Next: deltamem eval ADAPTER --static {result.adapter}, with the adapter that it matches")
    elif chosen.lora is None:
        click.echo(f"Next: deltamem eval {result.adapter} --task recall")


def _dry_run(path: str, recipe: Recipe, processes: int | None, as_json: bool) -> None:
    from deltamem_tool.cli.console import progress
    from deltamem_tool.training import dry_run

    with progress() as bar:
        task = bar.add_task("Computing", total=None, note="")

        def report(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of, note="a step without numbers")

        result = dry_run(recipe, report, processes)
    if not result.is_main:
        return
    if as_json:
        click.echo(json.dumps(asdict(result)))
        return

    from rich.table import Table
    from rich.text import Text

    from deltamem_tool.cli.console import STDOUT

    table = Table(title=Text(f"{path} would train"), show_header=False)
    for name, value in _lines(result):
        table.add_row(name, value)
    STDOUT.print(table)
    for note in result.notes:
        click.echo(note)


def _lines(figures: DryRun) -> Iterator[tuple[str, str]]:
    """Yield the rows of the table. What is not known is left out; the notes say why."""
    yield "parameters", f"{figures.trained_parameters:,}, {figures.share:.2%} of the base's {figures.base_parameters:,}"
    if figures.memory_bytes:
        yield "state of a conversation", f"{figures.memory_bytes:,} bytes"
    data = figures.episodes
    if data is not None:
        sample = " (a sample)" if figures.is_sample else ""
        yield "episodes", f"{data.episodes:,}{sample}, with {data.exchanges:,} exchanges"
        if figures.skipped_rows:
            yield "skipped rows", f"{figures.skipped_rows:,}"
        for name, counts in (("written", data.write_tokens), ("read", data.read_tokens)):
            yield f"tokens {name}", f"{counts.mean:,.1f} in the mean, {counts.max:,} at most"
        yield "tokens scored", f"{data.scored_tokens:,}"
        yield "histories cut", f"{data.cut:,}"
    if figures.steps is not None:
        yield "steps", f"{figures.steps:,}"
    if figures.epochs is not None:
        yield "epochs", f"{figures.epochs:.3g}"
    if figures.tokens_per_step is not None:
        processes = f", in {figures.processes} processes" if figures.processes > 1 else ""
        yield "tokens a step", f"{figures.tokens_per_step:,.1f}{processes}"
    peak = figures.peak
    if peak.gathered:
        yield "weights of the base", f"{_size(peak.weights)}, its part of {_size(figures.base_bytes)}"
        yield "weights gathered to compute", _size(peak.gathered)
    else:
        yield "weights of the base", _size(peak.weights)
    yield "adapter, gradients, optimizer", " + ".join(map(_size, (peak.adapter, peak.gradients, peak.optimizer)))
    if peak.activations is not None and peak.total is not None:
        yield "activations", f"{_size(peak.activations)} at most"
        yield "memory of a process", f"{_size(peak.total)}, estimated: CUDA's own, fragments and padding come on top"


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
