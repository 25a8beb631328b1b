"""Datasets of the Hub, over HTTP with the Hub's own client."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.talks import TALK, TOOLS
from fake_hub.isolation import environment
from fake_hub.server import HubServer
from helpers.tiny import write_jsonl

_READ = """
import json, sys
from deltamem_tool.data.sources import read_episodes
from deltamem_tool.data.sources import read_rows
from deltamem_tool.errors import DataError

for options in json.load(sys.stdin):
    try:
        if "name" in options:
            print(json.dumps(read_rows(**options)))
            continue
        loaded = read_episodes(**options)
        print(json.dumps([[each.where, each.history, each.exchanges] for each in loaded.episodes]))
    except DataError as error:
        print(json.dumps([error.what, error.why, error.next]))
"""
_CARD = """---
configs:
- config_name: distractor
  data_files:
  - split: validation
    path: distractor/validation-*
---
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of a process that reads datasets of the Hub sequentially, and the files that it requested."""
    root = tmp_path_factory.mktemp("hub")
    first, second = root / "first" / "data", root / "second"
    first.mkdir(parents=True)
    second.mkdir()
    for split, talks in (("train", [TALK, TOOLS]), ("test", [TALK[:2], TALK])):
        pq.write_table(pa.Table.from_pylist([{"messages": t} for t in talks]), first / f"{split}-00000.parquet")
    write_jsonl(second / "train.jsonl", [TALK * 2])
    requests = root / "asked"
    (requests / "distractor").mkdir(parents=True)
    (requests / "README.md").write_text(_CARD)
    # A column that holds messages elsewhere is a text here, and other columns are read too.
    rows = [{"id": str(number), "prompt": "Who?", "answer": ["Ann", None][number]} for number in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), requests / "distractor" / "validation-00000-of-00001.parquet")
    usual = ("distractor", ("validation",))
    tries = {
        "train": {"path": "someone/talks"},
        "some of it": {"path": "someone/talks", "split": "train[1:]"},
        "skipped": {"path": "someone/talks", "split": "test", "skip_bad_rows": True},
        "bad row": {"path": "someone/talks", "split": "test"},
        "revision": {"path": "someone/talks", "revision": "v2", "supervise": "all"},
        "no split": {"path": "someone/talks", "split": "validation"},
        "no revision": {"path": "someone/talks", "revision": "v3"},
        "no dataset": {"path": "someone/nothing"},
        "rows": {"name": "someone/asked", "what": "question", "usual": usual},
        "rows of a revision": {"name": "someone/asked@v2", "usual": usual},
        "rows of a split": {"name": "someone/asked", "split": "validation[1:]", "usual": usual},
        "no config": {"name": "someone/asked", "config": "fullwiki", "usual": usual},
        "no split of it": {"name": "someone/asked", "split": "test", "usual": usual},
        "no rows": {"name": "someone/nothing@v1"},
    }
    with HubServer() as server:
        server.add_repo("someone/talks", root / "first", repo_type="dataset")
        server.add_repo("someone/talks", second, repo_type="dataset", branch="v2")
        server.add_repo("someone/asked", requests, repo_type="dataset")
        pq.write_table(pa.Table.from_pylist(rows[:1]), requests / "distractor" / "validation-00000-of-00001.parquet")
        server.add_repo("someone/asked", requests, repo_type="dataset", branch="v2")
        variables = environment(server, root / "home") | {"PYTHONPATH": str(Path(__file__).parents[2])}
        result = subprocess.run(
            [sys.executable, "-c", _READ],
            input=json.dumps(list(tries.values())),
            capture_output=True,
            text=True,
            timeout=200,
            env=variables,
            cwd=root,
        )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return dict(zip(tries, lines, strict=True)), server.fetched()


def test_rows_of_a_split(results):
    read, requests = results
    first, second = read["train"]
    assert first == ["someone/talks[train] row 1", TALK[:2], [TALK[2:]]]
    assert second[0] == "someone/talks[train] row 2" and second[1] == TOOLS[:2]
    assert [message["role"] for message in second[2][0]] == ["user", "assistant", "tool", "assistant"]
    assert read["some of it"] == [["someone/talks[train[1:]] row 1", *second[1:]]]
    assert requests.count("someone/talks/data/train-00000.parquet") == 1


def test_rows_of_a_revision(results):
    read, _ = results
    assert [len(history) for _, history, _ in read["revision"]] == [2, 4, 6]


def test_bad_rows_are_named(results):
    read, _ = results
    what, why, after = read["bad row"]
    assert what == "someone/talks[test] row 1 has no history." and why and after
    assert [where for where, _, _ in read["skipped"]] == ["someone/talks[test] row 2"]


def test_missing_splits_and_datasets_are_named(results):
    read, _ = results
    what, why, after = read["no split"]
    assert what == "The dataset someone/talks has no split 'validation'." and after
    assert "train" in why and "test" in why
    for name, missing in (("no revision", "v3"), ("no dataset", "someone/nothing")):
        what, why, after = read[name]
        assert "no such dataset" in what and missing in why and after


def test_rows_are_read_with_their_place(results):
    read, _ = results
    first, second = {"id": "0", "prompt": "Who?", "answer": "Ann"}, {"id": "1", "prompt": "Who?"}
    assert read["rows"] == [
        ["someone/asked[validation] question 1", first],
        ["someone/asked[validation] question 2", second],
    ]
    assert read["rows of a revision"] == [["someone/asked@v2[validation] row 1", first]]
    assert read["rows of a split"] == [["someone/asked[validation[1:]] row 1", second]]
    for name, words in (
        ("no config", ("cannot be loaded", "fullwiki", "distractor")),
        ("no split of it", ("no split 'test'", "validation")),
        ("no rows", ("no such dataset", "someone/nothing")),
    ):
        assert all(word in " ".join(read[name]) for word in words) and all(read[name]), name
