"""Generate text with a base model: shared code of `own_answers.py` and `own_conversations.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.base_model.tokenizer import read_tokenizer
from deltamem_tool.io.atomic import write_atomically
from deltamem_tool.segments.messages import Message
from deltamem_tool.segments.template import ChatTemplate

BATCH = 32
SYSTEM = 0.5  # probability that a row has a system prompt

Command = Callable[..., None]


def arguments(count: int, new_tokens: int) -> Callable[[Command], Command]:
    """Return a decorator with the arguments of both commands, with the given defaults."""

    def add(command: Command) -> Command:
        for argument in (
            click.option("--seed", type=int, default=0, show_default=True),
            click.option(
                "--new-tokens",
                type=click.IntRange(min=1),
                default=new_tokens,
                show_default=True,
                help="Maximum length of a text, in tokens.",
            ),
            click.option(
                "--count", type=click.IntRange(min=1), default=count, show_default=True, help="Number of texts."
            ),
            click.argument("out", type=click.Path(dir_okay=False, path_type=Path)),
            click.argument("base"),
        ):
            command = argument(command)
        return command

    return add


class Base:
    """A base model that answers, with a random seed."""

    def __init__(self, name: str, seed: int) -> None:
        checkpoint = BaseCheckpoint(name)
        self._model, self._tokenizer = checkpoint.load(dtype=torch.bfloat16), read_tokenizer(checkpoint.source)
        self._tokenizer.padding_side = "left"
        self._template = ChatTemplate.from_tokenizer(self._tokenizer)
        torch.manual_seed(seed)

    def prompt(self, talk: Sequence[Message]) -> str:
        """Render a conversation as a prompt."""
        return self._template.render(talk, generation_prompt=True)

    def answers(self, prompts: Sequence[str], new_tokens: int, **sampling: Any) -> list[str]:
        """Continue each of the prompts. If it samples, it samples from all tokens of the base model."""
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            ids = self._model.generate(**inputs, max_new_tokens=new_tokens, top_k=0, **sampling)
        texts: list[str] = self._tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return texts


def write_rows(out: Path, rows: Sequence[Sequence[Message]], what: str) -> None:
    """Write conversations in the format of `data.unrelated`, and print their number."""
    lines = (json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(out, "".join(lines).encode())
    click.echo(f"{len(rows)} {what} in {out}")
