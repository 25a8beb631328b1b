"""Episodes made of natural facts (`facts`), with more facts and longer conversations as training progresses."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from torch.utils.data import Dataset

from deltamem_tool.data.episode import Episode
from deltamem_tool.data.fact_conversations import (
    fact_history,
    question_exchange,
    small_talk,
    statement_exchange,
    statement_sentence,
    system_prompt,
    unanswerable_exchange,
)
from deltamem_tool.data.fact_words import NOTHING, SYSTEMS, HeldOut
from deltamem_tool.data.facts import sample_facts, untold_fact


@dataclass(frozen=True)
class Growth:
    """A number that goes from `first` to `last` while training goes from the share `start` to the share `end`."""

    first: float
    last: float
    start: float = 0.0
    end: float = 0.0

    def at(self, share: float) -> float:
        """Return the number once this share of training is done."""
        done = 1.0 if share >= self.end else max(0.0, (share - self.start) / (self.end - self.start))
        return self.first + done * (self.last - self.first)

    def at_end(self) -> Growth:
        """Return the final value as a number that does not change."""
        return Growth(self.last, self.last)


@dataclass(frozen=True)
class FactOptions:
    """Options of the content of episodes.

    Args:
        facts: largest number of facts in an episode.
        chats: the share of episodes that are whole chats; the others state their facts in one message.
        talk: mean number of turns of small talk before each statement of a chat.
        bare: the share of values that are any word of the word list, whatever they are about.
        fewest: an episode has at least this share of the most facts there may be.
        third_person: the share of facts about other people than the user.
        unanswerable: the share of questions, those of the history too, about something that was not told.
        replies: the share of episodes that also train a reply which needs no memory.
        system: the system prompt of all; without one, half of the chats have one of `systems`, if there are any.
        systems: system prompts to draw from.
    """

    facts: Growth
    chats: Growth = Growth(1.0, 1.0)
    talk: Growth = Growth(1.0, 1.0)
    bare: Growth = Growth(0.0, 0.0)
    fewest: float = 0.0
    third_person: float = 0.0
    unanswerable: float = 0.0
    replies: float = 0.0
    system: str | None = None
    systems: tuple[str, ...] = SYSTEMS

    def at_end(self) -> FactOptions:
        """Return the options with everything at its final value."""
        grown = {name: getattr(self, name).at_end() for name in ("facts", "chats", "talk", "bare")}
        return replace(self, **grown)


class FactEpisodes(Dataset[Episode]):
    """Facts are told, then every one of them is asked for by itself.

    The number of facts, the form, and whether a reply is trained are a batch's, so that its episodes are of like
    length. Episode i depends on `seed`, the options and i alone.

    Args:
        episodes: number of episodes.
        batch_size: number of consecutive episodes that share a number of facts and a form.
        seed: random seed.
        options: content of the episodes.
        held_out: which words are drawn from those that no training sees.
    """

    def __init__(
        self, episodes: int, batch_size: int, seed: int, options: FactOptions, held_out: HeldOut = NOTHING
    ) -> None:
        self.episodes, self.batch_size, self.seed = episodes, batch_size, seed
        self.options, self.held_out = options, held_out

    def __len__(self) -> int:
        return self.episodes

    def __getitem__(self, index: int) -> Episode:
        if not 0 <= index < self.episodes:
            raise IndexError(index)
        options, held_out, rng = self.options, self.held_out, random.Random(f"{self.seed}/{index}")
        share = (index - index % self.batch_size) / self.episodes
        count, form, replies = self._of_batch(index // self.batch_size, share)
        facts = sample_facts(rng, count, held_out, options.third_person, options.bare.at(share))
        system = system_prompt(rng, form, options.systems, options.system)
        conversation = fact_history(
            rng, facts, form, held_out, options.talk.at(share), unanswerable=options.unanswerable
        )
        history = [*system, *conversation]
        exchanges = [question_exchange(rng, fact, form, held_out) for fact in facts]
        for _ in facts:
            while options.unanswerable and rng.random() < options.unanswerable:  # so that it is the share of all
                unsaid = untold_fact(rng, facts, held_out, options.third_person)
                exchanges.append(unanswerable_exchange(rng, unsaid, form, held_out))
        if replies:
            (replied,) = sample_facts(rng, 1, held_out, options.third_person)
            statement = statement_exchange(rng, statement_sentence(rng, replied, "chat", held_out))
            exchanges.append(rng.choice((statement, small_talk(rng, 1))))
        return Episode(history, [system + exchange for exchange in exchanges], f"generated episode {index}")

    def _of_batch(self, batch: int, share: float) -> tuple[int, str, bool]:
        """The number of facts and the form of the episodes of a batch, and whether they train a reply."""
        rng, ceiling = random.Random(f"{self.seed}/batch {batch}"), self.options.facts.at(share)
        most = int(ceiling) + (rng.random() < ceiling % 1)
        count = rng.randint(max(1, math.ceil(self.options.fewest * most)), most)
        form = "chat" if rng.random() < self.options.chats.at(share) else "plain"
        return count, form, rng.random() < self.options.replies
