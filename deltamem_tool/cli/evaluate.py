from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import click

from deltamem_tool.cli.options import device, torch_device, trust_remote_code
from deltamem_tool.evaluation import FACTS


@click.command("eval")
@click.argument("adapter")
@click.option("--task", type=click.Choice(["recall"]), default="recall", show_default=True, help="What to measure.")
@click.option("--base", help="Where the base model is, if not where the adapter says.")
@click.option("--facts", default=",".join(map(str, FACTS)), show_default=True, help="Numbers of facts told.")
@click.option(
    "--episodes", default=200, show_default=True, type=click.IntRange(1), help="Conversations for each number."
)
@click.option("--seed", default=0, show_default=True, help="Of the conversations.")
@click.option("--batch-size", default=100, show_default=True, type=click.IntRange(1), help="Conversations at once.")
@device
@trust_remote_code
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw the result as a PNG file.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON, which a push describes."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    adapter, task, base, facts, episodes, seed, batch_size, device, trust_remote_code, plot, out, as_json
) -> None:
    """Measure what ADAPTER's memory recalls, beside its controls."""
    try:
        counts = [int(part) for part in facts.split(",")]
    except ValueError:
        raise click.BadParameter(f"{facts!r} is no list like 1,2,4", param_hint="--facts") from None

    import torch

    from deltamem_tool.adapter import load, tokenizer_of
    from deltamem_tool.cli.console import progress
    from deltamem_tool.dialogues import KIND_OF
    from deltamem_tool.evaluation.recall import evaluate_recall
    from deltamem_tool.evaluation.record import evaluation_json
    from deltamem_tool.evaluation.report import plot_recall, recall_table
    from deltamem_tool.files import refuse_unwritable, write_whole
    from deltamem_tool.surgery import adapter_of

    if not counts or min(counts) < 1 or max(counts) > len(KIND_OF):
        raise click.BadParameter(f"the numbers go from 1 to {len(KIND_OF)}", param_hint="--facts")
    where = torch_device(device)
    if out is not None:
        refuse_unwritable(out)
    with progress() as bar:
        task_id = bar.add_task("Recall", total=None, note="")
        model = load(adapter, base=base, trust_remote_code=trust_remote_code)
        cast(torch.nn.Module, model).to(where)  # transformers hides the signature
        result = evaluate_recall(
            model,
            tokenizer_of(model),
            counts,
            episodes,
            seed,
            batch_size,
            report=lambda done, of: bar.update(task_id, completed=done, total=of),
        )
    if plot is not None:
        plot_recall(result, Path(plot))
    said = evaluation_json(result, adapter_of(model).fingerprint)
    if out is not None:
        write_whole(out, (json.dumps(said, indent=1) + "\n").encode())
    if as_json:
        click.echo(json.dumps(said))
    else:
        from rich.console import Console

        Console().print(recall_table(result))
        if plot is not None:
            click.echo(f"Plot: {plot}")
