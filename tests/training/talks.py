"""Conversations of different lengths, as training data."""

from __future__ import annotations

from pathlib import Path

from helpers.tiny import write_jsonl

from deltamem_tool.data import dialogues
from deltamem_tool.data.dialogues import assistant, user

PAIRS = (("dog", "Rex"), ("house", "Oslo"), ("car", "blue"), ("sister", "Anna"), ("exam", "noon"), ("dinner", "soup"))


def write_talks(path: Path, count: int = 24) -> Path:
    """Writes conversations that state some facts and ask for the first one."""
    talks = []
    for number in range(count):
        facts = [dialogues.Fact(*PAIRS[(number + i) % len(PAIRS)]) for i in range(1 + number % 3)]
        turns = [
            turn for fact in facts for turn in (user(fact.say(dialogues.STATEMENTS[number % 2])), assistant("Okay."))
        ]
        talks.append([*turns, user(facts[0].say(dialogues.QUESTIONS[0])), assistant(facts[0].answer)])
    return write_jsonl(path, talks)
