"""Episodes made of generated dialogues (`dialogues.py`), which tell facts and then ask for each of them separately."""

from __future__ import annotations

import math
import random

from torch.utils.data import Dataset

from deltamem_tool.data import dialogues
from deltamem_tool.data.episode import Episode

ASKED = 0.15  # generated histories hold questions too, so that the memory learns not to write them


class DialogueEpisodes(Dataset[Episode]):
    """Generated dialogues: facts told, then every one of them asked for by itself.

    The number of facts grows over training: at episode i of n it is drawn up to a ceiling that rises from
    `facts_first` to `facts_last` within the first `growth` of all episodes, and down to 1, or to that ceiling times
    `fewest`. A batch has one number, so that its episodes are of like length. With probability `replies` an episode
    also holds a statement or a remark and its reply, so that with a memory the model still does what it did without.
    Of all questions, those of the history too, the share `unanswerable` is about something that was not told, and the
    answer says so.
    Episode i depends on `seed` and i alone. With `held_out`, of the facts that no training sees.
    """

    def __init__(
        self,
        episodes: int,
        batch_size: int,
        seed: int,
        facts_first: int,
        facts_last: int,
        growth: float,
        fewest: float = 0.0,
        replies: float = 0.0,
        held_out: bool = False,
        unanswerable: float = 0.0,
    ) -> None:
        self.episodes, self.batch_size, self.seed, self.growth = episodes, batch_size, seed, growth
        self.facts_first, self.facts_last = facts_first, facts_last
        self.fewest, self.replies, self.held_out, self.unanswerable = fewest, replies, held_out, unanswerable

    def __len__(self) -> int:
        return self.episodes

    def __getitem__(self, index: int) -> Episode:
        if not 0 <= index < self.episodes:
            raise IndexError(index)
        rng = random.Random(f"{self.seed}/{index}")
        start = index - index % self.batch_size
        grown = min(1.0, start / max(1.0, self.growth * self.episodes))
        ceiling = self.facts_first + grown * (self.facts_last - self.facts_first)
        of_batch = random.Random(f"{self.seed}/batch {index // self.batch_size}")
        most = int(ceiling) + (of_batch.random() < ceiling % 1)
        count = of_batch.randint(max(1, math.ceil(self.fewest * most)), most)
        facts = dialogues.sample_facts(rng, count, held_out=self.held_out)
        history = dialogues.fact_history(rng, facts, self.held_out, asked=ASKED, unanswerable=self.unanswerable)
        exchanges = [dialogues.question_exchange(rng, fact) for fact in facts]
        for _ in facts:
            while self.unanswerable and rng.random() < self.unanswerable:  # so that it is the share of all questions
                exchanges.append(dialogues.unanswerable_exchange(rng, dialogues.untold_fact(rng, facts, self.held_out)))
        if self.replies and rng.random() < self.replies:
            replied = dialogues.sample_facts(rng, 1, held_out=self.held_out)
            exchanges.append(dialogues.fact_history(rng, replied, held_out=self.held_out)[:2])
        return Episode(history, exchanges, f"generated episode {index}")
