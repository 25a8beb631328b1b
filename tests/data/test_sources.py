"""Reading files into episodes: every bad row is named, or skipped and reported."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.talks import CALL, CALLING, FOUND, SYSTEM, TALK, TOOLS
from data.test_episode import BAD
from datasets import Dataset, Features, Json, List, Value
from helpers.tiny import write_jsonl

from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.data.episode import Episode
from deltamem_tool.data.sources import read_episodes
from deltamem_tool.errors import DataError


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    return path


def test_json_lines_are_read(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [TALK, [SYSTEM, *TALK], TOOLS])
    loaded = read_episodes(path)
    assert [episode.where for episode in loaded.episodes] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert loaded.episodes == [
        Episode(TALK[:2], [TALK[2:]]),
        Episode([SYSTEM, *TALK[:2]], [[SYSTEM, *TALK[2:]]]),
        Episode(TOOLS[:2], [TOOLS[2:]]),
    ]
    assert (loaded.rows, loaded.skipped) == (3, ())
    talks = write_jsonl(tmp_path / "long.jsonl", [TALK * 3])
    assert [len(episode.history) for episode in read_episodes(str(talks), supervise="all").episodes] == [2, 4, 6, 8, 10]


def test_only_a_line_feed_ends_a_line(tmp_path):
    """Other Unicode separators are text inside a JSON string."""
    text = "one\u2028two\u0085three\x0cfour"
    path = tmp_path / "chats.jsonl"
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # with a mark in front, as Windows writes it
        file.write(json.dumps({"messages": [*TALK[:3], assistant("a\u2028b\u0085c")]}, ensure_ascii=False) + "\r\n")
        file.write("\n  \n\ufeff")  # and in the middle, where two files were concatenated
        file.write(json.dumps({"messages": [user(text), *TALK[1:]]}, ensure_ascii=False))
    loaded = read_episodes(path)
    assert loaded.rows == 2
    assert loaded.episodes[0].exchanges[0][-1]["content"] == "a\u2028b\u0085c"
    assert loaded.episodes[1].history[0]["content"] == text
    assert loaded.episodes[1].where == f"{path}:4"


NO_JSON = [("{not json}", "is not JSON"), ('{"messages": [', "is not JSON"), ("[" * 100_000, "is not JSON")]


@pytest.mark.parametrize(("line", "says"), NO_JSON + BAD)
def test_a_bad_line_is_named(tmp_path, line, says):
    path = write_jsonl(tmp_path / "chats.jsonl", [TALK])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(DataError, match=f"(?s){says}") as refusal:
        read_episodes(path)
    assert refusal.value.what.startswith(f"{path}:3")
    assert refusal.value.why and refusal.value.next
    loaded = read_episodes(path, skip_bad_rows=True)
    assert loaded.episodes == [Episode(TALK[:2], [TALK[2:]])] and loaded.rows == 2
    assert [str(error) for error in loaded.skipped] == [str(refusal.value)]


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    path = write_jsonl(tmp_path / "latin.jsonl", [TALK])
    path.write_bytes(path.read_bytes() + b'{"messages": "caf\xe9"}\n')
    with pytest.raises(DataError, match=f"(?s){path}:2 is not UTF-8"):
        read_episodes(path)
    assert len(read_episodes(path, skip_bad_rows=True).skipped) == 1


def test_parquet_is_read(tmp_path):
    """In a table, every message has the keys of all messages; null means that the message lacks the key."""
    (tmp_path / "odd [1] *?").mkdir()
    path = write_parquet(tmp_path / "odd [1] *?" / "chats.parquet", [{"messages": TALK}, {"messages": TOOLS}])
    loaded = read_episodes(path)
    call = {"type": "function", "function": {"name": "look", "arguments": {"where": "shed"}}}
    turn = [{**message} for message in TOOLS[2:]]
    turn[1]["tool_calls"] = [call]
    assert [episode.where for episode in loaded.episodes] == [f"{path} row 1", f"{path} row 2"]
    assert loaded.episodes[0] == Episode(TALK[:2], [TALK[2:]])
    assert loaded.episodes[1].history == TOOLS[:2]
    assert loaded.episodes[1].exchanges == [turn]


def test_unused_columns_are_named(tmp_path, caplog):
    rows = [{"messages": TALK, "id": 1}, {"messages": TALK, "prompt": "a?", "mesages": []}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_parquet(tmp_path / "chats.parquet", [{"id": 1, "messages": TALK, "tools": None, "source": "a"}])
    for name, columns in (("chats.jsonl", "id, prompt, mesages"), ("chats.parquet", "id, source")):
        caplog.clear()
        assert read_episodes(tmp_path / name).episodes[0] == Episode(TALK[:2], [TALK[2:]])
        (record,) = caplog.records
        assert record.getMessage() == f"{tmp_path / name} has columns that are not used: {columns}."
    caplog.clear()
    read_episodes(write_jsonl(tmp_path / "chats.jsonl", [TALK]))
    assert not caplog.records


def test_parquet_with_tools_is_read(tmp_path):
    """In a table, every tool and every row has the keys of all."""
    look = {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
    }
    find = {
        "type": "function",
        "function": {"name": "find", "parameters": {"type": "object", "properties": {"b": {"type": "string"}}}},
    }
    rows = [
        {"tools": [look, find], "chat_template_kwargs": {"a": 1}},
        {"tools": [find], "chat_template_kwargs": {"b": [2]}},
    ]
    path = write_parquet(tmp_path / "chats.parquet", [{"messages": TALK, **each} for each in rows])
    episodes = read_episodes(path).episodes
    assert [each.template_kwargs for each in episodes] == [{"a": 1, "tools": [look, find]}, {"b": [2], "tools": [find]}]


def test_parquet_with_prompts_is_read(tmp_path):
    rows = [
        {"prompt": "a?", "response": "b", "history": "h", "messages": None, "id": 1},
        {"prompt": None, "response": None, "history": None, "messages": TALK, "id": 2},
    ]
    loaded = read_episodes(write_parquet(tmp_path / "chats.PARQUET", rows))
    assert loaded.episodes == [Episode([user("h")], [[user("a?"), assistant("b")]]), Episode(TALK[:2], [TALK[2:]])]


def test_parquet_with_json_columns_is_read(tmp_path):
    """`datasets` writes the arguments of tools with different parameters as JSON."""
    message = {"role": Value("string"), "content": Value("string"), "tool_calls": List(Json())}
    plain = [{**message, "tool_calls": None} for message in (*TALK[:2], user("Where?"))]
    rows = {"messages": [[*plain, {**CALLING, "content": None}]]}
    path = tmp_path / "chats.parquet"
    Dataset.from_dict(rows, features=Features({"messages": List(message)})).to_parquet(path)
    (episode,) = read_episodes(path).episodes
    assert episode.exchanges[0][1]["tool_calls"][0]["function"]["name"] == CALL["function"]["name"]


def test_a_bad_row_of_parquet_is_named(tmp_path):
    rows = [{"messages": TALK}, {"messages": TALK[:2]}, {"messages": [user("a"), {"role": "bot", "content": "b"}]}]
    path = write_parquet(tmp_path / "chats.parquet", rows)
    with pytest.raises(DataError, match="has no history") as refusal:
        read_episodes(path)
    assert refusal.value.what.startswith(f"{path} row 2 ")
    loaded = read_episodes(path, skip_bad_rows=True)
    assert (len(loaded.episodes), loaded.rows) == (1, 3)
    assert [error.what.split(" row ")[1][0] for error in loaded.skipped] == ["2", "3"]
    (tmp_path / "other.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"(?s)other.parquet is not a parquet file"):
        read_episodes(tmp_path / "other.parquet")


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for nowhere in (tmp_path / "nowhere", "nowhere.jsonl", "some/where.parquet", "a/b/c", "~/x"):
        with pytest.raises(DataError, match=f"There is no data file {nowhere}"):
            read_episodes(nowhere)
    for kind in ("empty.jsonl", "empty.parquet"):
        path = tmp_path / kind
        path.write_text("\n\n") if kind.endswith("jsonl") else write_parquet(path, [{"messages": TALK}][:0])
        with pytest.raises(DataError, match=r"(?s)has no conversations.*is empty"):
            read_episodes(path)
    (tmp_path / "bad.jsonl").write_text("{}\n{}\n")
    with pytest.raises(DataError, match=r"(?s)All of its 2 rows are invalid.*bad.jsonl:1"):
        read_episodes(tmp_path / "bad.jsonl", skip_bad_rows=True)
    (tmp_path / "chats.csv").write_text("a,b")
    (tmp_path / "folder.jsonl").mkdir()
    for other in ("chats.csv", "folder.jsonl"):
        with pytest.raises(DataError, match=r"(?s)not a supported data file.*\.jsonl and \.parquet.*Hub"):
            read_episodes(other)


def test_a_split_or_revision_of_a_file_raises(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [TALK])
    for options in ({"split": "test"}, {"revision": "v2"}):
        with pytest.raises(DataError, match="no split and no revision"):
            read_episodes(path, **options)


def test_a_dataset_without_a_network_raises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"(?s)someone/talks cannot be loaded.*Hub.*jsonl"):
        read_episodes("someone/talks")


def test_the_message_of_a_tool_keeps_its_keys(tmp_path):
    (episode,) = read_episodes(write_jsonl(tmp_path / "chats.jsonl", [TOOLS])).episodes
    assert episode.exchanges[0][2] == FOUND and episode.exchanges[0][1] == CALLING  # null arguments too
