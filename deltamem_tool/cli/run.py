"""`deltamem run`: answer prompts with an ONNX folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from deltamem_tool.cli.options import NAME, TEXT, UserPath, sampling_options, window
from deltamem_tool.io.atomic import check_writable
from deltamem_tool.io.cores import MAX_THREADS

_FILE = UserPath(dir_okay=False, path_type=Path)


@click.command("run")
@click.argument("onnx_dir", type=NAME)
@click.option(
    "--prompt", "prompts", type=TEXT, multiple=True, required=True, help="User message; repeat it for further turns."
)
@click.option("--system", type=TEXT, help="System message before the first turn.")
@click.option("--memory", "memory_file", type=_FILE, help="Memory file to start from.")
@click.option("--save-memory", type=_FILE, help="File to write the memory to afterwards.")
@sampling_options
@window
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Execution provider for the graph.",
)
@click.option("--map-weights", is_flag=True, help="Memory-map the weights: loads at once, but prompts are slower.")
@click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    help="Threads per call.  [default: ORT_INTRA_OP_NUM_THREADS or OMP_NUM_THREADS, or else the usable cores]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming text.")
def command(
    onnx_dir: str,
    prompts: tuple[str, ...],
    system: str | None,
    memory_file: Path | None,
    save_memory: Path | None,
    window: int | None,
    provider: str,
    threads: int | None,
    map_weights: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer prompts with ONNX_DIR (an ONNX folder or a Hub id), in ONNX Runtime and without PyTorch."""
    from deltamem_tool.memory.file import check_replaceable, read_memory
    from deltamem_tool.memory.shared_file import SharedMemoryFile

    saved = None if save_memory is None else SharedMemoryFile(save_memory)
    if saved is not None:
        check_replaceable(saved.path)
        check_writable(saved.path)
        saved.read()

    from deltamem_tool.chat.answer_output import AnswerOutput
    from deltamem_tool.chat.conversation import INTERRUPTED, Conversation, Sampling
    from deltamem_tool.cli.console import SPINNER, STDERR
    from deltamem_tool.onnx.runtime.engine import OnnxModel

    options = Sampling(**sampling)
    with STDERR.status("Loading the model", spinner=SPINNER):
        model = OnnxModel(onnx_dir, provider, threads, map_weights)
        conversation = Conversation(model, read_memory(memory_file) if memory_file else None, window=window)
    answers = []
    output = AnswerOutput(_show)
    try:
        for turn, prompt in enumerate(prompts):
            content: str | list[dict[str, str]] = prompt
            if system is not None and turn == 0:
                content = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
            answers.append(conversation.generate(content, options, None if as_json else output))
            if not as_json:
                output.end()
            if answers[-1].why == INTERRUPTED:
                raise KeyboardInterrupt
    finally:  # what was said before a turn that failed is kept
        if saved is not None and answers:
            saved.write(conversation.memory)
    if as_json:
        result = {
            "answers": [answer.text for answer in answers],
            "ended_by": [answer.why for answer in answers],
            "tokens": sum(len(answer.tokens) for answer in answers),
            "memory_file": None if saved is None else str(saved.path),
        }
        click.echo(json.dumps(result))


def _show(piece: str) -> None:
    click.echo(piece, nl=False)
    sys.stdout.flush()
