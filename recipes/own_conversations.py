"""Write conversations of two people as a base model imagines them: `data.unrelated` of a recipe, beside own_answers.py.

Command: python recipes/own_conversations.py BASE OUT.jsonl [--count 480] [--new-tokens 150] [--seed 0]

The base is asked to write what two friends say to each other, and samples it. One of them becomes the user, the other
the assistant, and each of the assistant's turns a row, after one or three turns before it. People who talk say other
things than an assistant who answers, and what is learned from the rows holds for such talk as well.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import click
from own_answers import WORDS
from own_texts import BATCH, SYSTEM, Base, arguments, write_rows

from deltamem_tool.cli.console import progress
from deltamem_tool.data.fact_words import NAMES
from deltamem_tool.segments.messages import Message

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
@arguments(count=480, new_tokens=150)
def main(base: str, out: Path, count: int, new_tokens: int, seed: int) -> None:
    """Write the turns of COUNT conversations that BASE imagines."""
    model, rng = Base(base, seed), random.Random(seed)
    topics = [word for kind in ("thing", "task") for word in WORDS[kind].split("|")]
    rows = []
    with progress() as bar:
        task = bar.add_task("Imagining", total=count, note="")
        for start in range(0, count, BATCH):
            pairs = [rng.sample(NAMES[False], 2) for _ in range(min(BATCH, count - start))]
            asked = [rng.choice(PROMPTS).format(*pair, rng.choice(topics)) for pair in pairs]
            prompts = [
                f"{model.prompt([{'role': 'user', 'content': text}])}{user}: "
                for text, (user, _) in zip(asked, pairs, strict=True)
            ]
            texts = model.answers(prompts, new_tokens, do_sample=True, temperature=TEMPERATURE)
            for (user, assistant), text in zip(pairs, texts, strict=True):
                messages = turns(f"{user}: {text}", user, assistant)
                for end in range(2, len(messages) + 1, 2):
                    system = [{"role": "system", "content": ""}] if rng.random() < SYSTEM else []
                    rows.append([*system, *messages[max(0, end - rng.choice((2, 4))) : end]])
            bar.update(task, completed=start + len(pairs))
    write_rows(out, rows, "turns")


if __name__ == "__main__":
    main()
