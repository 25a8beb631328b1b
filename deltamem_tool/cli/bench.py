"""`deltamem bench`: measure what a memory costs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from deltamem_tool.bench import BASE, DECODED, LORA, MEMORY, MODELS, ONNX, PROMPTS, PYTORCH, REPEATS, RUNTIMES
from deltamem_tool.cli.options import (
    NAME,
    SEED,
    UserPath,
    single_device,
    torch_device,
    trust_remote_code,
    whole_numbers,
)
from deltamem_tool.io.cores import MAX_THREADS
from deltamem_tool.onnx.export.targets import DTYPES


@click.command("bench")
@click.argument("adapter", type=NAME)
@click.option("--base", type=NAME, help="Folder or Hub id of the base model, if not the recorded one.")
@click.option(
    "--models",
    default=",".join(MODELS),
    show_default=True,
    help=f"Models to compare: the {BASE} model alone, with the {MEMORY}, and with a {LORA}.",
)
@click.option(
    "--lora",
    type=NAME,
    metavar="DIR",
    help="LoRA saved by PEFT.  [default: a random one of the memory's size on q and o]",
)
@click.option(
    "--runtimes",
    help=f"Runtimes, out of {','.join(RUNTIMES)}.  [default: {PYTORCH}; with --onnx both]",
    metavar="NAME,NAME",
)
@click.option(
    "--onnx",
    metavar="DIR",
    help=f"ONNX folder of ADAPTER; the other models are exported too. Without it, --runtimes {ONNX} exports all.",
)
@click.option(
    "--prompt",
    callback=whole_numbers,
    default=",".join(map(str, PROMPTS)),
    show_default=True,
    metavar="N,N",
    help="Prompt lengths, in tokens.",
)
@click.option(
    "--decode",
    default=DECODED,
    show_default=True,
    type=click.IntRange(1),
    help="Number of tokens to generate after the first one.",
)
@click.option(
    "--batch-size", default=1, show_default=True, type=click.IntRange(1), help="Number of conversations at once."
)
@click.option(
    "--repeats",
    default=REPEATS,
    show_default=True,
    type=click.IntRange(1),
    help="Number of repeats of each measurement.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    help="CPU threads per call.  [default: OMP_NUM_THREADS, or the usable cores]",
)
@single_device
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Data type of the base model's weights.  [default: the export's or the checkpoint's]",
)
@click.option("--no-peak", is_flag=True, help="Skip peak memory, which needs a separate process for each row.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed for tokens, order and weights.")
@trust_remote_code
@click.option(
    "--out", type=UserPath(dir_okay=False, path_type=Path), help="Write the result as JSON, with every repeat."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    adapter: str,
    base: str | None,
    models: str,
    lora: str | None,
    runtimes: str | None,
    onnx: str | None,
    prompt: tuple[int, ...],
    decode: int,
    batch_size: int,
    repeats: int,
    threads: int | None,
    device: str | None,
    dtype: str | None,
    no_peak: bool,
    seed: int,
    trust_remote_code: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure what ADAPTER's memory costs, compared with the base model and a LoRA.

    Reports tokens per second for the prompt and the answer, time to the first token, peak memory, and the size of a
    memory file. All models are measured in turn in one process, in a new random order each time, so that their ratios
    hold on a machine whose absolute times do not.
    """
    from deltamem_tool.bench.setting import Setting

    names = runtimes or ",".join(RUNTIMES if onnx else (PYTORCH,))
    setting = Setting(
        adapter,
        base=base,
        lora=lora,
        onnx=onnx,
        models=tuple(models.split(",")),
        runtimes=tuple(names.split(",")),
        prompts=prompt,
        decode=decode,
        batch_size=batch_size,
        repeats=repeats,
        threads=threads,
        device=str(torch_device(device)),
        dtype=dtype,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    from deltamem_tool.bench.run import bench
    from deltamem_tool.cli.console import progress
    from deltamem_tool.io.atomic import check_writable, write_atomically

    if out is not None:
        check_writable(out)
    with progress() as bar:
        task = bar.add_task("Measuring", total=None, note="")

        def report(step: str, done: int, of: int) -> None:
            bar.update(task, completed=done, total=of, note=step)

        result = bench(setting, peaks=not no_peak, report=report)
    document = result.to_json()
    if out is not None:
        write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    if as_json:
        click.echo(json.dumps(document))
        return
    from deltamem_tool.cli.console import STDOUT

    for length in setting.prompts:
        STDOUT.print(result.table(length))
    for sentence in result.sentences():
        click.echo(sentence)
