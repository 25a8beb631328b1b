"""Mixing generated episodes with a user's own: the share, the order, and reproducibility."""

from __future__ import annotations

import math

import pytest
from data.talks import TALK

from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.data.encode import Encoder
from deltamem_tool.data.episode import Episode
from deltamem_tool.data.mixed_episodes import MixedEpisodes
from deltamem_tool.data.store import encode_cached
from deltamem_tool.data.synthetic import DialogueEpisodes

OWN = [Episode(TALK[:2], [[user("And now?"), assistant(f"It is {n}.")]], f"own:{n}") for n in range(7)]


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, 200, 90, recent_turns=1)


def mixed(encoder, mix, count=40, seed=0, dropout=0.0):
    generated = DialogueEpisodes(count, 4, 0, 1, 3, 0.5)
    return MixedEpisodes(encode_cached(OWN, encoder, context_dropout=dropout, seed=seed), generated, encoder, mix, seed)


@pytest.mark.parametrize("mix", [0.0, 0.1, 0.3, 0.5, 0.75])
def test_any_prefix_has_the_generated_share_and_own_episodes_repeat_by_epoch(encoder, mix):
    where = [episode.where for episode in mixed(encoder, mix)]
    is_generated = [name.startswith("generated") for name in where]
    assert all(sum(is_generated[:n]) == math.floor(n * mix) for n in range(41))
    assert all(name == f"generated episode {n}" for n, name in enumerate(where) if is_generated[n]), "as a run grows"
    own = [name for name in where if name.startswith("own")]
    epochs = [own[start : start + 7] for start in range(0, len(own) - 6, 7)]
    assert all(sorted(epoch) == [episode.where for episode in OWN] for epoch in epochs)
    assert len(epochs) < 2 or epochs[0] != epochs[1]


def test_an_episode_depends_only_on_seed_and_number(encoder):
    first, again, other = mixed(encoder, 0.3), mixed(encoder, 0.3), mixed(encoder, 0.3, seed=1)
    backwards = [again[index] for index in reversed(range(40))][::-1]
    assert [first[index] for index in range(40)] == backwards != [other[index] for index in range(40)]
    with pytest.raises(IndexError):
        first[40]


def test_each_epoch_redraws_which_conversations_lose_their_recent_turns(encoder):
    episodes = list(mixed(encoder, 0.0, count=280, dropout=0.5))
    alone = {episode.where: encoder([own])[0].exchanges for own in OWN for episode in [own]}
    lost = [
        [episode.exchanges == alone[episode.where] for episode in episodes if episode.where == own.where] for own in OWN
    ]
    assert all(0 < sum(of_one) < 40 for of_one in lost)
