"""`deltamem bench`: what a memory costs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from deltamem_tool.bench import BASE, DECODED, LORA, MEMORY, MODELS, ONNX, PROMPTS, PYTORCH, REPEATS, RUNTIMES
from deltamem_tool.cli.options import device, torch_device, trust_remote_code, whole_numbers
from deltamem_tool.onnx.export.targets import DTYPES


@click.command("bench")
@click.argument("adapter")
@click.option("--base", help="Where the base model is, if not where the adapter says.")
@click.option(
    "--models",
    default=",".join(MODELS),
    show_default=True,
    help=f"What to compare: {BASE} alone, {BASE} with the {MEMORY}, {BASE} with a {LORA}.",
)
@click.option(
    "--lora", metavar="DIR", help="A LoRA that PEFT has saved.  [default: a fresh one of the memory's size on q and o]"
)
@click.option(
    "--runtimes", help=f"Of {','.join(RUNTIMES)}.  [default: {PYTORCH}; with --onnx both]", metavar="NAME,NAME"
)
@click.option(
    "--onnx",
    metavar="DIR",
    help=f"An export of ADAPTER. The others' graphs are made for the purpose; without it, with --runtimes {ONNX}, all.",
)
@click.option(
    "--prompt",
    callback=whole_numbers,
    default=",".join(map(str, PROMPTS)),
    show_default=True,
    metavar="N,N",
    help="Tokens of the prompts.",
)
@click.option(
    "--decode", default=DECODED, show_default=True, type=click.IntRange(1), help="Tokens after the first one."
)
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(1), help="Conversations at once.")
@click.option("--repeats", default=REPEATS, show_default=True, type=click.IntRange(1), help="Of everything, in turn.")
@click.option("--threads", type=click.IntRange(1), help="On the CPU, of one call.  [default: the usable cores]")
@device
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Of the base's weights.  [default: the export's or the checkpoint's]"
)
@click.option("--no-peak", is_flag=True, help="Leave out peak memory, which takes a process for each row.")
@click.option("--seed", default=0, show_default=True, help="Of tokens, order and fresh weights.")
@trust_remote_code
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON, every repeat in it."
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
    """Measure what ADAPTER's memory costs, beside the base model and a LoRA.

    Tokens per second of prompt and of answer, time to the first token, peak memory, and the size of a memory file. All
    models are visited in turn, in one process and in an order drawn anew each time, so that ratios hold on a machine
    whose times do not.
    """
    from deltamem_tool.bench.setting import Setting
    from deltamem_tool.errors import ConfigError

    if lora is not None and LORA not in models.split(","):
        raise ConfigError(f"{lora} would not be used.", f"The models lack {LORA}.", f"Add {LORA} to --models.")
    named = ",".join(RUNTIMES if onnx else (PYTORCH,)) if runtimes is None else runtimes
    setting = Setting(
        adapter,
        base=base,
        lora=lora,
        onnx=onnx,
        models=tuple(models.split(",")),
        runtimes=tuple(named.split(",")),
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
    from deltamem_tool.bench.report import cost_table, sentences
    from deltamem_tool.bench.run import bench
    from deltamem_tool.cli.console import progress
    from deltamem_tool.io.atomic import refuse_unwritable, write_whole

    if out is not None:
        refuse_unwritable(out)
    with progress() as bar:
        task = bar.add_task("Measuring", total=None, note="")
        found = bench(
            setting,
            peaks=not no_peak,
            report=lambda what, done, of: bar.update(task, completed=done, total=of, note=what),
        )
    said = found.to_json()
    if out is not None:
        write_whole(out, (json.dumps(said, indent=1) + "\n").encode())
    if as_json:
        click.echo(json.dumps(said))
        return
    from rich.console import Console

    for length in setting.prompts:
        Console().print(cost_table(found, length))
    for sentence in sentences(found):
        click.echo(sentence)
