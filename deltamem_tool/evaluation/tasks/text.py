"""The likelihood of a text's continuation, with a memory that is unrelated to it."""

from __future__ import annotations

from typing import Literal

from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation.task import Item, require_data
from deltamem_tool.evaluation.tasks.unrelated import read_text, unrelated_conversations

_ASK = "Go on with this text:\n\n"


class Text:
    """A text file in passages. The first half of each is in the context, and the second half is scored as the answer.

    Args:
        data: the file.
        words: number of words per passage; a shorter rest at the end is left out.
        history: conversations in a format of `deltamem train`, from which the memories are written; by default they are
            generated, one per passage.
        facts: number of facts in each generated conversation, `unrelated.FACTS` by default; with 0 the memory is empty.
        seed: random seed for the generated conversations.

    Raises:
        ConfigError: there is no data, or an option is out of range.
    """

    name = "text"
    by_likelihood: Literal[True] = True

    def __init__(
        self,
        data: str | None = None,
        words: int = 200,
        history: str | None = None,
        facts: int | None = None,
        seed: int = 0,
    ) -> None:
        if type(words) is not int or words < 2:
            raise ConfigError("The number of words of a passage must be 2 or more.", f"It is {words!r}.", "Correct it.")
        self._data, self._words = require_data(self.name, data, "text.txt", history=history), words
        self._history, self._facts, self._seed = history, facts, seed

    def items(self) -> list[Item]:
        """Return one item per passage.

        Raises:
            DataError: the text is shorter than one passage.
        """
        words, size = read_text(self._data).split(), self._words
        passages = [words[start : start + size] for start in range(0, len(words) - size + 1, size)]
        if not passages:
            raise DataError(
                f"{self._data} has no passage of {size} words.", f"It has {len(words)}.", "Use a longer text."
            )
        talks = unrelated_conversations(len(passages), self._facts, self._seed, self._history)
        return [
            Item(
                f"passage {number}",
                name,
                history,
                [{"role": "user", "content": _ASK + " ".join(passage[: size // 2])}],
                [" ".join(passage[size // 2 :])],
                "passages",
                f"{self._data} passage {number}",
            )
            for number, (passage, (name, history)) in enumerate(zip(passages, talks, strict=True), start=1)
        ]
