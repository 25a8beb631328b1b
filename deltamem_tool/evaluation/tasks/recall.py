"""Facts are told in a conversation, and one is asked for. Every fact is a held-out pair: no answer was trained."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from deltamem_tool import dialogues
from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation import EPISODES, FACTS
from deltamem_tool.evaluation.metrics import exact
from deltamem_tool.evaluation.task import Item


class Recall:
    """`episodes` conversations for each number of `facts`; scored is whether the whole answer is the expected one.

    Raises:
        ConfigError: a number of facts cannot be.
    """

    name = "recall"
    metrics = ("exact",)
    max_new_tokens = 24

    def __init__(self, facts: Sequence[int] = FACTS, episodes: int = EPISODES, seed: int = 0) -> None:
        if not facts or min(facts) < 1 or max(facts) > len(dialogues.KIND_OF):
            raise ConfigError(f"The numbers of facts go from 1 to {len(dialogues.KIND_OF)}.", f"It is {facts}.")
        self._facts, self._episodes, self._seed = facts, episodes, seed

    def items(self) -> list[Item]:
        return [item for count in self._facts for item in self._told(count)]

    def _told(self, facts: int) -> list[Item]:
        rng = random.Random(f"recall/{self._seed}/{facts}")
        items = []
        for number in range(self._episodes):
            chosen = dialogues.sample_facts(rng, facts, held_out=True)
            asked = rng.choice(chosen)
            history = dialogues.telling(rng, chosen, held_out=True)
            group = f"{facts} fact{'s' * (facts > 1)}"
            name = f"{group}, conversation {number}"
            question = dialogues.user(asked.question(rng))
            items.append(Item(name, name, [history], [question], [asked.answer], group, name))
        return items

    def score(self, item: Item, answer: str) -> Mapping[str, float]:
        return {"exact": exact(answer, item.answers[0])}
