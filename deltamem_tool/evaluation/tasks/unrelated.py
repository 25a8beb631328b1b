"""Conversations that are unrelated to the question, to fill a memory that should not matter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.io.names import expand_user
from deltamem_tool.segments.messages import Message

FACTS = 6  # that a generated conversation tells

Talk = tuple[str, Sequence[Sequence[Message]]]  # its name, and its sessions: one, or none


def unrelated_conversations(count: int, facts: int, seed: int, data: str | None = None) -> list[Talk]:
    """Conversations for so many questions: generated ones, or those of a file in turn.

    Args:
        count: how many.
        facts: that each generated one tells, as a chat; with 0 nothing was said, and the memory is empty.
        seed: of what is generated.
        data: conversations as `deltamem train` reads them.

    Raises:
        ConfigError: the number of facts is not one.
        DataError: `data` cannot be read.
    """
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

    # Not every chat template takes a system prompt.
    options = FactOptions(Growth(facts, facts), fewest=1.0, systems=())
    generated = FactEpisodes(count, 1, seed, options, EVERYTHING)
    return [(name, [generated[number].history]) for number, name in enumerate(names)]


def read_text(file: str | Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return expand_user(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read.", f"{error}.", "Use a text file in UTF-8.") from error
