"""`deltamem run`: talk to an ONNX folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from deltamem_tool.files import refuse_unwritable
from deltamem_tool.onnx.contract import MAX_NEW_TOKENS

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("run")
@click.argument("onnx_dir", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, required=True, help="What to say; repeat it for further turns.")
@click.option("--system", help="A system message before the first turn.")
@click.option("--memory", "memory_file", type=_FILE, help="Start from this memory file.")
@click.option("--save-memory", type=_FILE, help="Write the memory there afterwards.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=MAX_NEW_TOKENS,
    show_default=True,
    help="The longest answer.",
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest token."
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample among the likeliest tokens that hold this much probability.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the sampling.")
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="What runs the graph."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming text.")
def command(
    onnx_dir: Path,
    prompts: tuple[str, ...],
    system: str | None,
    memory_file: Path | None,
    save_memory: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    provider: str,
    as_json: bool,
) -> None:
    """Answer with the model in ONNX_DIR, which `deltamem export` wrote, in ONNX Runtime and without PyTorch."""
    if save_memory is not None:
        refuse_unwritable(save_memory)

    from deltamem_tool.cli.console import STDERR
    from deltamem_tool.onnx.runtime import CPU, CUDA, OnnxModel

    with STDERR.status("Loading the model"):
        model = OnnxModel(onnx_dir, [{"cpu": CPU, "cuda": CUDA}[provider]])
        conversation = model.start(model.load_memory(memory_file) if memory_file else None)
    answers = []
    for turn, prompt in enumerate(prompts):
        content: str | list[dict[str, str]] = prompt
        if system is not None and turn == 0:
            content = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        show = None if as_json else _show
        answers.append(conversation.generate(content, max_new_tokens, temperature, top_p, seed, show))
        if not as_json:
            click.echo()
    if save_memory is not None:
        conversation.save_memory(save_memory)
    if as_json:
        result = {
            "answers": [answer.text for answer in answers],
            "tokens": sum(len(answer.tokens) for answer in answers),
            "memory_file": str(save_memory) if save_memory else None,
        }
        click.echo(json.dumps(result))


def _show(piece: str) -> None:
    click.echo(piece, nl=False)
    sys.stdout.flush()
