"""Encoded episodes on disk equal the encoder's output; which view is read depends only on seed, epoch and index."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace

import datasets
import pytest
from data.talks import SYSTEM, TALK
from torch.utils.data import DataLoader

from deltamem_tool.data.collate import EpisodeCollator
from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.data.encode import IGNORED, Encoder
from deltamem_tool.data.episode import Episode
from deltamem_tool.data.store import encode_cached
from deltamem_tool.data.synthetic import DialogueEpisodes
from deltamem_tool.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "deltamem"


EPISODES = [Episode([SYSTEM, *TALK], [TALK[2:], [SYSTEM, *TALK[:2]]], "a:1")]
EPISODES += [replace(DialogueEpisodes(300, 8, 0, 1, 3, 0.5)[n], where=f"b:{n}") for n in range(300)]
LONG = Episode(TALK[:2], [[user("Why?"), assistant("because " * 90)]], "a:9")


@pytest.mark.parametrize("granularity", ["token", "message"])
def test_stored_episodes_equal_the_encoded_ones(tokenizer, granularity):
    encoder = Encoder(tokenizer, 30, 100, granularity, full_context=True)
    stored = encode_cached(EPISODES, encoder)
    expected = encoder(EPISODES)
    assert len(stored) == len(expected) and [stored[n] for n in range(len(stored))] == expected
    assert stored.lengths == [len(each.write_ids) for each in expected]
    assert stored.skipped == ()
    for index in (-1, len(stored)):
        with pytest.raises(IndexError):
            stored[index]
    assert list(pickle.loads(pickle.dumps(stored))) == expected


def test_statistics_match_a_plain_loop(tokenizer):
    stored = encode_cached(EPISODES, Encoder(tokenizer, 30, 100, recent_turns=1))
    statistics = stored.statistics()
    expected = Encoder(tokenizer, 30, 100)(EPISODES)
    written = [len(each.write_ids) for each in expected]
    exchanges = [exchange for each in expected for exchange in each.exchanges]
    read = [len(exchange.ids) for exchange in exchanges]
    assert (statistics.episodes, statistics.exchanges) == (len(expected), len(exchanges))
    for counts, lengths in ((statistics.write_tokens, written), (statistics.read_tokens, read)):
        assert (counts.max, counts.total) == (max(lengths), sum(lengths))
        assert counts.mean == pytest.approx(sum(lengths) / len(lengths))
    assert statistics.scored_tokens == sum(label != IGNORED for exchange in exchanges for label in exchange.labels)
    assert statistics.cut == sum(each.cut > 0 for each in expected)
    assert 0 < statistics.cut < statistics.episodes


def test_recent_turns_are_hidden_with_a_probability(tokenizer):
    encoder = Encoder(tokenizer, 100, 100, recent_turns=1)
    expected = encoder(EPISODES)
    stored = encode_cached(EPISODES, encoder, context_dropout=0.3, seed=5)
    hidden = {}
    for epoch in (0, 1):
        stored.set_epoch(epoch)
        hidden[epoch] = [random.Random(f"5/{epoch}/{n}").random() < 0.3 for n in range(len(stored))]
        for n, (each, alone) in enumerate(zip(expected, hidden[epoch], strict=True)):
            assert stored[n] == (each if alone else replace(each, exchanges=each.recent))
    assert 0.2 < sum(hidden[0]) / len(stored) < 0.4 and hidden[0] != hidden[1]
    for share, view in ((0.0, "recent"), (1.0, "exchanges")):
        stored = encode_cached(EPISODES, encoder, context_dropout=share)
        assert all(stored[n].exchanges == getattr(each, view) for n, each in enumerate(expected))
    plain = Encoder(tokenizer, 100, 100)
    stored = encode_cached(EPISODES, plain, context_dropout=0.5)
    assert list(stored) == plain(EPISODES)  # there is nothing to hide
    with pytest.raises(ConfigError, match="context_dropout is 2"):
        encode_cached(EPISODES, plain, context_dropout=2)


def test_episodes_that_cannot_be_encoded_are_named_or_skipped(tokenizer, cache):
    encoder = Encoder(tokenizer, 100, 60)
    episodes = [EPISODES[0], LONG, *EPISODES[1:]]
    with pytest.raises(DataError, match=r"a:9: An exchange has .*max_read_tokens = 60"):
        encode_cached(episodes, encoder)
    assert not list(cache.rglob("*.arrow"))
    for _ in ("made", "found"):
        stored = encode_cached(episodes, encoder, skip_bad_rows=True)
        assert list(stored) == encoder(EPISODES)
        (error,) = stored.skipped
        assert error.what.startswith("a:9: ") and error.next.startswith("Raise max_read_tokens")
    with pytest.raises(DataError, match=r"a:9: An exchange has .*max_read_tokens = 60"):
        encode_cached(episodes, encoder)  # though it is there, without that one
    for nothing, why in (([LONG] * 2, "first of 2: a:9"), ([], "There is none")):
        with pytest.raises(DataError, match=f"(?s)No episode can be encoded.*{why}"):
            encode_cached(nothing, encoder, skip_bad_rows=True)


def test_progress_is_reported_only_while_encoding(tokenizer):
    reports = []
    for _ in ("made", "found"):
        encode_cached(EPISODES, Encoder(tokenizer, 100, 100), report=lambda *parts: reports.append(parts))
    assert reports == [(256, 301), (301, 301)]


def test_a_loader_with_workers_reads_the_same_batches(tokenizer):
    encoder = Encoder(tokenizer, 100, 100)
    stored = encode_cached(EPISODES[:20], encoder)
    loader = DataLoader(stored, batch_size=5, collate_fn=EpisodeCollator(encoder), num_workers=1)
    read = [row.tolist() for batch in loader for row in batch["write_mask"].sum(1)]
    assert read == stored.lengths
