"""Generate the episodes that a recipe asks for."""

from __future__ import annotations

from dataclasses import replace

from deltamem_tool.data.encode import Encoder
from deltamem_tool.data.episode import Episode
from deltamem_tool.data.fact_episodes import FactEpisodes, FactOptions, Growth
from deltamem_tool.data.fact_words import EVERYTHING, SYSTEMS
from deltamem_tool.data.synthetic import DialogueEpisodes
from deltamem_tool.errors import DataError
from deltamem_tool.recipe.schema import DataOptions, Recipe

_TRIED = 64  # episodes, from the whole run


def generated_episodes(
    recipe: Recipe, episodes: int, together: int, encoder: Encoder
) -> DialogueEpisodes | FactEpisodes:
    """Generate the training episodes of a run with this many episodes, `together` of them in a batch.

    Raises:
        DataError: the recipe sets a system prompt but the chat template does not support one; or one of the episodes
            that are tried has an exchange that is too long.
    """
    data, seed = recipe.data, recipe.training.seed
    if data.generated == "facts":
        facts = FactEpisodes(episodes, together, seed, fact_options(data, encoder))
        tried = min(_TRIED, episodes)
        encoder([facts[place * episodes // tried] for place in range(tried)])
        return facts
    numbers = (data.facts_first, data.facts_last, data.growth, data.fewest)
    return DialogueEpisodes(episodes, together, seed, *numbers, data.replies, unanswerable=data.unanswerable)


def held_out_episodes(recipe: Recipe, count: int, encoder: Encoder) -> list[Episode]:
    """Generate the validation episodes of a run: of maximum difficulty, with words or pairs never used in training.

    All of them need the memory: they have no unanswerable questions and no replies that the base model gives by itself.

    Raises:
        DataError: as in `generated_episodes`.
    """
    data, seed = recipe.data, recipe.training.seed
    episodes: DialogueEpisodes | FactEpisodes
    if data.generated == "facts":
        options = replace(fact_options(data, encoder).at_end(), unanswerable=0.0, replies=0.0)
        episodes = FactEpisodes(count, 1, seed, options, EVERYTHING)
    else:
        hardest = (data.facts_last, data.facts_last, 0.0, data.fewest)
        episodes = DialogueEpisodes(count, count, seed, *hardest, held_out=True)
    return [episodes[index] for index in range(count)]


def fact_options(data: DataOptions, encoder: Encoder) -> FactOptions:
    """Return a recipe's options for natural facts. Chats have no system prompt if the template does not support one.

    Raises:
        DataError: as in `generated_episodes`.
    """
    takes_system = encoder.takes_system(data.system or SYSTEMS[0])
    if data.system is not None and not takes_system:
        raise DataError(
            "The chat template does not support a system prompt.", "data.system gives one.", "Leave out data.system."
        )
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
        systems=SYSTEMS if takes_system else (),
    )
