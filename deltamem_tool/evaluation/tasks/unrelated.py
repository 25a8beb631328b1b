"""Conversations that are unrelated to the question, to fill a memory that should not matter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.io.names import expand_user
from deltamem_tool.segments.messages import Message

FACTS = 6  # number of facts in a generated conversation

Talk = tuple[str, Sequence[Sequence[Message]]]  # name and sessions (one or none)


def unrelated_conversations(count: int, facts: int | None, seed: int, data: str | None = None) -> list[Talk]:
    """Return one conversation per question: generated ones, or those of a file in turn.

    Args:
        count: number of questions.
        facts: number of facts in each generated chat, `FACTS` by default; with 0 there is no history, and the memory is
            empty.
        seed: random seed for the generated conversations.
        data: conversations in a format of `deltamem train`.

    Raises:
        ConfigError: the number of facts is not valid, or is given besides `data`.
        DataError: `data` cannot be read.
    """
    if facts is not None and data is not None:
        raise ConfigError(
            "facts and history cannot be combined.",
            "The number of facts is that of generated conversations, and those of a file are used instead.",
            "Leave out one of them.",
        )
    facts = FACTS if facts is None else facts
    if type(facts) is not int or facts < 0:
        raise ConfigError(
            "The number of facts of a conversation must be 0 or more.", f"It is {facts!r}.", "Correct it."
        )
    if data is not None:
        from deltamem_tool.data.sources import read_episodes

        episodes = read_episodes(data).episodes
        talks = [(f"conversation {number}", [episode.history]) for number, episode in enumerate(episodes, start=1)]
        return [talks[number % len(talks)] for number in range(count)]
    names = [f"conversation {number}" for number in range(1, count + 1)]
    if facts == 0:
        return [(name, []) for name in names]
    from deltamem_tool.data.fact_episodes import FactEpisodes, FactOptions, Growth
    from deltamem_tool.data.fact_words import EVERYTHING

    # Not every chat template supports a system prompt.
    options = FactOptions(Growth(facts, facts), fewest=1.0, systems=())
    generated = FactEpisodes(count, 1, seed, options, EVERYTHING)
    return [(name, [generated[number].history]) for number, name in enumerate(names)]


def read_text(file: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return expand_user(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read.", f"{error}.", "Use a text file in UTF-8.") from error
