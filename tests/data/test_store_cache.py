"""The cache key covers all that affects an encoding; a cache is complete or absent; damaged ones are rebuilt."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import datasets
import pytest
from data.made_once import encode
from data.talks import TALK
from helpers.forked_process import forked_process
from helpers.tiny import tiny_tokenizer

from deltamem_tool.data import store
from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.data.encode import Encoder
from deltamem_tool.data.episode import Episode
from deltamem_tool.data.store import encode_cached, encoding_fingerprint

EPISODES = [Episode(TALK[:2], [TALK[2:]], "a:1"), Episode(TALK, [TALK[2:]], "a:2")]
OPTIONS = {"max_write_tokens": 30, "max_read_tokens": 60}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "deltamem" / "generator"


def tables(folder: Path) -> list[Path]:
    """All tables below the folder, incomplete ones included."""
    return list(folder.rglob("*.arrow"))


def is_made(episodes, encoder) -> bool:
    """Whether the episodes were encoded, instead of found in the cache."""
    reports = []
    encode_cached(episodes, encoder, report=lambda *parts: reports.append(parts))
    return bool(reports)


def test_the_same_episodes_are_found_in_the_cache(folder):
    assert is_made(EPISODES, Encoder(tiny_tokenizer(), **OPTIONS))
    again = tiny_tokenizer()
    again(["a", "bcd"], padding=True, truncation=True, max_length=2)  # which the tokenizer remembers
    assert not is_made(deepcopy(EPISODES), Encoder(again, **OPTIONS))
    assert len(tables(folder)) == 1


@pytest.mark.parametrize(
    "option",
    [
        {"max_write_tokens": 31},
        {"max_read_tokens": 61},
        {"granularity": "message"},
        {"granularity": "sentence"},
        {"recent_turns": 1},
        {"recent_turns": 2},
        {"full_context": True},
    ],
    ids=str,
)
def test_every_option_changes_the_fingerprint(tokenizer, option):
    keys = [encoding_fingerprint(EPISODES, Encoder(tokenizer, **OPTIONS | change)) for change in ({}, option)]
    assert keys[0] != keys[1]
    assert is_made(EPISODES, Encoder(tokenizer, **OPTIONS))
    assert is_made(EPISODES, Encoder(tokenizer, **OPTIONS | option))


def test_options_returns_every_argument_of_the_encoder(tokenizer):
    import inspect

    names = set(inspect.signature(Encoder).parameters) - {"tokenizer"}
    assert set(Encoder(tokenizer, **OPTIONS).options()) == names


def test_template_options_of_a_row_change_the_fingerprint(tokenizer):
    encoder = Encoder(tokenizer, **OPTIONS)
    changed = [replace(episode, template_kwargs={"enable_thinking": False}) for episode in EPISODES]
    assert encoding_fingerprint(changed, encoder) != encoding_fingerprint(EPISODES, encoder)


def one_word_more(tokenizer):
    tokenizer.add_tokens(["Rex"])


def another_template(tokenizer):
    tokenizer.chat_template += "{# the same, in other words #}"


def another_end(tokenizer):
    tokenizer.eos_token = "<|user|>"


def lower_case(tokenizer):
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize("change", [one_word_more, another_template, another_end, lower_case])
def test_any_change_of_the_tokenizer_changes_the_fingerprint(change):
    other = tiny_tokenizer()
    change(other)
    assert is_made(EPISODES, Encoder(tiny_tokenizer(), **OPTIONS))
    assert is_made(EPISODES, Encoder(other, **OPTIONS))


def test_the_class_of_the_tokenizer_changes_the_fingerprint():
    other = tiny_tokenizer()
    other.__class__ = type("Other", (type(other),), {})
    encoders = [Encoder(tokenizer, **OPTIONS) for tokenizer in (tiny_tokenizer(), other)]
    assert encoding_fingerprint(EPISODES, encoders[0]) != encoding_fingerprint(EPISODES, encoders[1])


@pytest.mark.parametrize(
    "episodes",
    [
        EPISODES[:1],
        EPISODES[::-1],
        [EPISODES[0], replace(EPISODES[1], where="a:3")],
        [EPISODES[0], replace(EPISODES[1], history=[*TALK[:3], assistant("Max.")])],
        [EPISODES[0], replace(EPISODES[1], exchanges=[TALK[:2]])],
        [EPISODES[0], replace(EPISODES[1], history=[user("My dog"), *TALK[1:]])],
        [EPISODES[0], replace(EPISODES[1], history=[{**TALK[0], "name": "Anna"}, *TALK[1:]])],
    ],
    ids=["fewer", "order", "where", "answer", "exchange", "history", "key"],
)
def test_any_change_of_the_episodes_changes_the_fingerprint(tokenizer, episodes):
    encoder = Encoder(tokenizer, **OPTIONS)
    assert is_made(EPISODES, encoder)
    assert is_made(episodes, encoder)


def test_the_version_of_the_encoding_changes_the_fingerprint(tokenizer, monkeypatch):
    encoder = Encoder(tokenizer, **OPTIONS)
    assert is_made(EPISODES, encoder)
    monkeypatch.setattr(store, "ENCODING_VERSION", store.ENCODING_VERSION + 1)
    assert is_made(EPISODES, encoder)


def cut_short(table: Path) -> None:
    table.write_bytes(table.read_bytes()[:-400])


def lose_the_table(table: Path) -> None:
    table.unlink()


def lose_the_description(table: Path) -> None:
    (table.parent / "dataset_info.json").unlink()


@pytest.mark.parametrize("damage", [cut_short, lose_the_table, lose_the_description])
def test_a_damaged_cache_is_rebuilt(tokenizer, folder, damage, caplog):
    encoder = Encoder(tokenizer, **OPTIONS)
    encode_cached(EPISODES, encoder)
    (table,) = tables(folder)
    before = table.read_bytes()
    damage(table)
    assert not caplog.records
    assert list(encode_cached(EPISODES, encoder)) == encoder(EPISODES)
    assert ("damaged" in caplog.text) == (damage is not lose_the_description)  # which `datasets` recreates by itself
    assert tables(folder) == [table] and table.read_bytes() == before


def test_a_failure_leaves_nothing(tokenizer, folder):
    def full(result, total):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        encode_cached(EPISODES, Encoder(tokenizer, **OPTIONS), report=full)
    assert tables(folder) == []
    assert is_made(EPISODES, Encoder(tokenizer, **OPTIONS))


@pytest.mark.slow
def test_two_processes_encode_once(tmp_path):
    """The directory is the one that HF_DATASETS_CACHE names."""
    pipes, processes = [], []
    for _ in range(2):
        ours, theirs = Pipe()
        process = forked_process(encode, theirs, str(tmp_path / "named"))
        process.start()
        theirs.close()  # a killed process is one that reports nothing more
        pipes.append(ours)
        processes.append(process)
    assert [pipe.recv() for pipe in pipes] == ["ready"] * 2
    for pipe in pipes:
        pipe.send("go")
    received = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(reports for reports, _ in received) == [[], [(256, 300), (300, 300)]]
    assert received[0][1] == received[1][1] and len(received[0][1]) == 300
    assert len(tables(tmp_path / "named")) == 1
