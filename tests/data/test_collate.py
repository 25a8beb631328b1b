"""Collating episodes into tensors, compared with plain loops."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from data.talks import SYSTEM, TALK
from data.test_encode import EPISODES

from deltamem_tool.data.collate import EpisodeCollator, collate
from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.data.encode import IGNORED, Encoder
from deltamem_tool.data.episode import Episode
from deltamem_tool.data.sources import read_exchanges
from deltamem_tool.data.synthetic import DialogueEpisodes
from deltamem_tool.data.unrelated_exchanges import UnrelatedExchanges
from deltamem_tool.errors import DataError
from deltamem_tool.segments.tags import SegmentTag

KEYS = {"write_ids", "write_mask", "read_ids", "read_mask", "labels", "rows", "scored", "targets"}


def assert_rows(rows, tensor, fill):
    """Check that `tensor` is `rows`, padded on the right and no wider than needed."""
    assert tensor.shape == (len(rows), max(map(len, rows)))
    for row, expected in zip(tensor.tolist(), rows, strict=True):
        assert row == [*expected, *[fill] * (len(row) - len(expected))]


@pytest.mark.parametrize("granularity", ["token", "message"])
def test_rows_are_padded_on_the_right(tokenizer, granularity):
    encoder = Encoder(tokenizer, 40, 1000, granularity, full_context=True)
    encoded = encoder(EPISODES)
    batch = EpisodeCollator(encoder)(encoded)
    segments = {"write_segment_tags"} if granularity == "message" else set()
    assert batch.pop("sources") == ["a:1", ""]
    assert set(batch) == KEYS | segments | {"full_ids", "full_mask", "full_scored"}
    assert_rows([each.write_ids for each in encoded], batch["write_ids"], tokenizer.pad_token_id)
    assert_rows([[1] * len(each.write_ids) for each in encoded], batch["write_mask"], 0)
    if segments:
        assert_rows([each.tags for each in encoded], batch["write_segment_tags"], SegmentTag.OUTSIDE)
        assert batch["write_segment_tags"].dtype == torch.int8
    for name, view in (("read", "exchanges"), ("full", "full")):
        exchanges = [exchange for each in encoded for exchange in getattr(each, view)]
        assert_rows([exchange.ids for exchange in exchanges], batch[f"{name}_ids"], tokenizer.pad_token_id)
        assert_rows([[1] * len(exchange.ids) for exchange in exchanges], batch[f"{name}_mask"], 0)
    assert_rows([exchange.labels for each in encoded for exchange in each.exchanges], batch["labels"], IGNORED)
    assert batch["rows"].tolist() == [0, 0, 1]


def test_scored_positions_are_those_before_the_labels(tokenizer):
    """Compared with a loop over the encoded exchanges, not over the tensors."""
    encoder = Encoder(tokenizer, 1000, 1000, recent_turns=1, full_context=True)
    episodes = [*EPISODES, *(DialogueEpisodes(20, 4, 0, 1, 4, 0.5)[n] for n in range(20))]
    encoded = encoder(episodes)
    batch = collate(encoded, encoder.pad, segments=False)
    for view, name in (("exchanges", "read"), ("full", "full")):
        width = batch[f"{name}_ids"].shape[1]
        places, targets = [], []
        for row, exchange in enumerate(exchange for each in encoded for exchange in getattr(each, view)):
            for place in range(len(exchange.ids) - 1):
                if exchange.labels[place + 1] != IGNORED:
                    places.append(row * width + place)
                    targets.append(exchange.ids[place + 1])
        assert batch["scored" if name == "read" else "full_scored"].tolist() == places
        assert batch["targets"].tolist() == targets  # the same tokens, in the same order, in both views
    flat = batch["full_ids"].flatten()
    assert torch.equal(flat[batch["full_scored"] + 1], batch["targets"])
    assert batch["scored"].dtype == batch["targets"].dtype == torch.int64


def test_without_full_context_there_are_no_full_views(tokenizer):
    batch = collate(Encoder(tokenizer, 100, 1000)(EPISODES), 0, segments=False)
    assert set(batch) == KEYS


def test_collating_encodes_episodes(tokenizer):
    encoder = Encoder(tokenizer, 30, 1000, "message")
    alone, encoded = (EpisodeCollator(encoder)(episodes) for episodes in (EPISODES, encoder(EPISODES)))
    assert set(alone) == set(encoded) and alone.pop("sources") == encoded.pop("sources")
    assert all(torch.equal(alone[name], encoded[name]) for name in alone)


def test_the_padding_token_is_chosen_in_order(tokenizer):
    """Without a padding token, the end token is used, and without that any token, since a mask hides it."""
    other = deepcopy(tokenizer)  # a copy shares its special tokens
    other.pad_token = None
    assert Encoder(other, 10, 10).pad == tokenizer.eos_token_id
    other.eos_token = None
    assert Encoder(other, 10, 10).pad == 0
    batch = EpisodeCollator(Encoder(other, 10, 50))([Episode([SYSTEM, *TALK], [TALK[2:]])])
    assert (batch["read_mask"] == 1).all()


OTHERS = [[user("What is rain?"), assistant("Water.")], [SYSTEM, user("Hello."), assistant("Hello to you.")]]


def test_unrelated_exchanges_are_added_to_each_episode(tokenizer):
    encoder = Encoder(tokenizer, 1000, 1000)
    exchanges = encoder.exchanges([(f"others:{n}", talk) for n, talk in enumerate(OTHERS, start=1)])
    for exchange, talk in zip(exchanges, OTHERS, strict=True):
        (alone,) = encoder([Episode([user("Hello.")], [talk])])[0].exchanges
        assert exchange == alone
    unrelated = UnrelatedExchanges(exchanges, seed=0)
    encoded = encoder(EPISODES)
    drawn = [unrelated.for_episode(episode) for episode in encoded]
    batch = EpisodeCollator(encoder, unrelated)(EPISODES)
    assert_rows([exchange.ids for exchange in drawn], batch["unrelated_ids"], tokenizer.pad_token_id)
    assert_rows([[1] * len(exchange.ids) for exchange in drawn], batch["unrelated_mask"], 0)
    width = batch["unrelated_ids"].shape[1]
    scored = [
        row * width + place
        for row, exchange in enumerate(drawn)
        for place, label in enumerate(exchange.labels[1:])
        if label != IGNORED
    ]
    assert batch["unrelated_scored"].tolist() == scored
    assert set(EpisodeCollator(encoder)(EPISODES)) == set(batch) - {f"unrelated_{n}" for n in ("ids", "mask", "scored")}


def test_unrelated_exchanges_depend_only_on_episode_and_seed(tokenizer):
    encoder = Encoder(tokenizer, 1000, 1000)
    exchanges = encoder.exchanges([("", [user("Hello."), assistant(f"{n}.")]) for n in "12345"])
    episodes = encoder([DialogueEpisodes(40, 4, 0, 1, 4, 0.5)[n] for n in range(40)])

    def drawn(seed, order=1):
        chosen = [
            exchanges.index(UnrelatedExchanges(exchanges, seed).for_episode(episode)) for episode in episodes[::order]
        ]
        return chosen[::order]

    assert drawn(0) == drawn(0, order=-1) != drawn(1)
    assert set(drawn(0)) == set(range(len(exchanges)))


def test_an_unrelated_conversation_that_cannot_be_encoded_is_named(tokenizer, tmp_path):
    encoder, file = Encoder(tokenizer, 1000, 20), tmp_path / "others.jsonl"
    long = [user("Hello. " * 20), assistant("Hello.")]
    with pytest.raises(DataError, match=r"^others:1: An exchange has \d+ tokens, more than max_read_tokens = 20"):
        encoder.exchanges([("others:1", long)])
    rows = [{"messages": OTHERS[0]}, {"prompt": "What is rain?", "response": "Water."}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [talk for _, talk in read_exchanges(file)] == [OTHERS[0]] * 2
    file.write_text(json.dumps({"messages": OTHERS[0][:1]}))
    with pytest.raises(DataError, match=r"others.jsonl:1 asks nothing"):
        read_exchanges(file)
    file.write_text("")
    with pytest.raises(DataError, match="has no conversations"):
        read_exchanges(file)
