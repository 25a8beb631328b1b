"""Write conversations of two people as a base model imagines them: `data.unrelated` of a recipe, beside own_answers.py.

Command: python recipes/own_conversations.py BASE OUT.jsonl [--count 512] [--new-tokens 150] [--seed 0]

The base is asked to write what two friends say to each other, and samples it. One of them becomes the user, the other
the assistant, and each of the assistant's turns a row, after one or three turns before it. People who talk say other
things than an assistant who answers, and what is learned from the rows holds for such talk as well.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import click
import torch
from own_answers import BATCH, SYSTEM, WORDS

from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.base_model.tokenizer import read_tokenizer
from deltamem_tool.cli.console import progress
from deltamem_tool.data.fact_words import NAMES
from deltamem_tool.io.atomic import write_whole
from deltamem_tool.segments.messages import Message
from deltamem_tool.segments.template import ChatTemplate

TEMPERATURE = 0.8
SHORTEST = 9  # characters of a line that says something
PROMPTS = (
    "Write a conversation between two friends, {} and {}. They have not seen each other for weeks, and tell each other "
    "what they have done; then they talk about {}.",
    "Write a chat between {} and {}, who are close friends. They talk about their families, their plans, and {}.",
    "Write the text messages that {} and {} send each other about {} and about their week.",
)


def turns(text: str, user: str, assistant: str) -> list[Message]:
    """Read lines `NAME: what is said` as turns, from the user's first one to the assistant's last one."""
    messages: list[Message] = []
    for name, said in re.findall(r"^\W*(\w+)\W*?:\W*(.+?)\W?$", text, re.MULTILINE):
        if name not in (user, assistant) or len(said) < SHORTEST:
            continue
        role = "user" if name == user else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f" {said}"
        elif messages or role == "user":
            messages.append({"role": role, "content": said})
    return messages[: len(messages) // 2 * 2]


@click.command()
@click.argument("base")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--count", type=click.IntRange(min=1), default=512, show_default=True, help="How many conversations.")
@click.option("--new-tokens", type=click.IntRange(min=1), default=150, show_default=True, help="The longest of them.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(base: str, out: Path, count: int, new_tokens: int, seed: int) -> None:
    """Write the turns of COUNT conversations that BASE imagines."""
    checkpoint = BaseCheckpoint(base)
    model, tokenizer = checkpoint.load(dtype=torch.bfloat16), read_tokenizer(checkpoint.source)
    tokenizer.padding_side = "left"
    template, rng = ChatTemplate.of(tokenizer), random.Random(seed)
    torch.manual_seed(seed)
    topics = [word for kind in ("thing", "task") for word in WORDS[kind].split("|")]
    rows = []
    with progress() as bar:
        task = bar.add_task("Imagining", total=count, note="")
        for start in range(0, count, BATCH):
            pairs = [rng.sample(NAMES[False], 2) for _ in range(min(BATCH, count - start))]
            prompts = [
                template.render(
                    [{"role": "user", "content": rng.choice(PROMPTS).format(*pair, rng.choice(topics))}],
                    generation_prompt=True,
                )
                + f"{pair[0]}: "
                for pair in pairs
            ]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
            with torch.inference_mode():
                ids = model.generate(
                    **inputs, max_new_tokens=new_tokens, do_sample=True, top_k=0, temperature=TEMPERATURE
                )
            texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for (user, assistant), text in zip(pairs, texts, strict=True):
                messages = turns(f"{user}: {text}", user, assistant)
                for end in range(2, len(messages) + 1, 2):
                    system = [{"role": "system", "content": ""}] if rng.random() < SYSTEM else []
                    rows.append({"messages": [*system, *messages[max(0, end - rng.choice((2, 4))) : end]]})
            bar.update(task, completed=start + len(pairs))
    write_whole(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    click.echo(f"{len(rows)} turns in {out}")


if __name__ == "__main__":
    main()
