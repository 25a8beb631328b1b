"""The episodes that a recipe without data of its own generates."""

from __future__ import annotations

from dataclasses import replace

from torch.utils.data import Dataset

from deltamem_tool.data.episode import Episode
from deltamem_tool.data.fact_episodes import FactEpisodes, FactOptions, Growth
from deltamem_tool.data.fact_words import EVERYTHING
from deltamem_tool.data.synthetic import DialogueEpisodes
from deltamem_tool.recipe.schema import DataOptions, Recipe


def generated_episodes(recipe: Recipe, episodes: int, together: int) -> Dataset[Episode]:
    """Generate what a run of so many episodes learns from, `together` of them in a batch."""
    data, seed = recipe.data, recipe.training.seed
    if data.generated == "facts":
        return FactEpisodes(episodes, together, seed, fact_options(data))
    facts = (data.facts_first, data.facts_last, data.growth, data.fewest)
    return DialogueEpisodes(episodes, together, seed, *facts, data.replies, unanswerable=data.unanswerable)


def held_out_episodes(recipe: Recipe, count: int) -> list[Episode]:
    """Generate what a run is evaluated with: as hard as episodes get, of words or pairs that no training sees.

    All of it needs the memory: nothing is unanswerable, and there are no replies that the base gives alone.
    """
    data, seed = recipe.data, recipe.training.seed
    episodes: Dataset[Episode]
    if data.generated == "facts":
        options = replace(fact_options(data).ended(), unanswerable=0.0, replies=0.0)
        episodes = FactEpisodes(count, 1, seed, options, EVERYTHING)
    else:
        hardest = (data.facts_last, data.facts_last, 0.0, data.fewest)
        episodes = DialogueEpisodes(count, count, seed, *hardest, held_out=True)
    return [episodes[index] for index in range(count)]


def fact_options(data: DataOptions) -> FactOptions:
    """What a recipe says of natural facts."""
    chats = (data.chats_from, data.chats_until)
    return FactOptions(
        facts=Growth(data.facts_first, data.facts_last, 0.0, data.growth),
        chats=Growth(data.chats_first, data.chats_last, *chats),
        talk=Growth(data.talk_first, data.talk_last, *chats),
        bare=Growth(data.bare_first, data.bare_last, 0.0, data.growth),
        fewest=data.fewest,
        third_person=data.third_person,
        unanswerable=data.unanswerable,
        replies=data.replies,
        system=data.system,
    )
