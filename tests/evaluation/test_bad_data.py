"""Data in the wrong format and questions without an answer: the error names file and item."""

from __future__ import annotations

import copy
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation.published import QUESTION, SPLITS, TALK, write

from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation.task import find_task

MISSING = "missing"
# A row with two questions, of which the tests change the second answer; and the names of the changed items.
ROW = SPLITS["Conflict_Resolution"][1]
ITEMS = {
    "locomo": "conversation 1 question 4",
    "hotpotqa": "question 1",
    "memoryagentbench": "row 1 question 2",
}
every_task = pytest.mark.parametrize("task", ITEMS)


def with_answer(task: str, answer):
    """A published row with another answer to one question."""
    content = copy.deepcopy({"locomo": TALK, "hotpotqa": QUESTION, "memoryagentbench": ROW}[task])
    place, key = {"locomo": (content.get("qa", [0] * 4)[3], "answer"), "hotpotqa": (content, "answer")}.get(
        task, (content.get("answers"), 1)
    )
    if answer is MISSING:
        del place[key]
    else:
        place[key] = answer
    return [content]


def refused(task: str, data: str, **options) -> DataError:
    with pytest.raises(DataError) as error:
        find_task(task, {"data": data, **options}).items()
    assert error.value.what and error.value.why and error.value.next
    assert data in error.value.what
    return error.value


@every_task
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("cut.json", b'[{"question": "Who', "not JSON"),
        ("object.json", b'{"data": []}', "not a JSON list"),
        ("empty.json", b"", "not JSON"),
        ("nothing.json", b"[]", "no entries"),
        ("number.json", b"3", "not a JSON list"),
        ("deep.json", b"[" * 100_000, "not JSON"),
        ("binary.json", b"\x89PNG\r\n\x1a\n\x00\xff", "not JSON"),
        ("table.csv", b"question,answer\nWho?,Ann\n", "not JSON"),
        ("words.json", b'["who", "when"]', "1 is not a"),
        ("other.json", b'[{"messages": []}]', "1 is not a"),
        ("nulls.json", b"[null]", "1 is not a"),
        ("lists.json", b"[[1, 2], [3]]", "1 is not a"),
        ("cut.jsonl", b'{"question": "Who\n', "cut.jsonl:1 is not JSON"),
        ("latin.jsonl", b'{"question": "\xe9"}\n', "latin.jsonl:1 is not UTF-8"),
        ("empty.jsonl", b"\n\n", "no entries"),
        ("cut.parquet", b"PAR1 and nothing more", "not a parquet file"),
    ],
)
def test_a_file_of_another_format_raises(tmp_path, task, name, content, says):
    file = tmp_path / name
    file.write_bytes(content)
    assert says in refused(task, str(file)).what


@every_task
def test_a_table_of_another_format_raises(tmp_path, task):
    pq.write_table(pa.table({"question": ["Who?"], "label": [3]}), tmp_path / "other.parquet")
    assert "1 is not a" in refused(task, str(tmp_path / "other.parquet")).what


@every_task
@pytest.mark.parametrize("answer", [MISSING, None, "", " ", [], {}, [""], [None]], ids=repr)
def test_a_question_without_an_answer_raises(tmp_path, task, answer):
    error = refused(task, write(tmp_path / "rows.json", with_answer(task, answer)))
    assert "answer" in error.why
    if (task, answer) != ("memoryagentbench", MISSING):  # a list that is too short, without saying for which question
        assert error.what.startswith(f"{tmp_path}/rows.json {ITEMS[task]} is not a")


@every_task
def test_missing_data_raise(tmp_path, task):
    with pytest.raises(ConfigError, match=f"The task {task} needs its data"):
        find_task(task, {})
    assert "There is no data file" in refused(task, str(tmp_path / "nowhere.json")).what
    assert "There is no data file" in refused(task, "data/nowhere.parquet").what
    assert "There is no data file" in refused(task, "nowhere").what
    # A name on the Hub, whose client is offline here.
    assert "someone/nothing" in refused(task, "someone/nothing").what
    file = write(tmp_path / "rows.json", with_answer(task, "x"))
    assert "no config and no split" in refused(task, file, split="train").what


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"context": None}, "context"),
        ({"context": " "}, "context"),
        ({"questions": "Who?"}, "lists"),
        ({"questions": []}, "lists"),
        ({"questions": ["Who?", "Where?", "When?"]}, "3 questions and 2 answers"),
        ({"questions": ["Who?", ""]}, "question 2"),
        ({"metadata": None}, "source"),
        ({"metadata": "ruler"}, "str"),
        ({"metadata": {"source": "squad"}}, "squad"),
    ],
)
def test_rows_that_are_not_memoryagentbench_are_named(tmp_path, change, says):
    error = refused("memoryagentbench", write(tmp_path / "rows.json", [ROW, {**ROW, **change}]))
    assert error.what.startswith(f"{tmp_path}/rows.json row 2") and says in f"{error.what} {error.why}"


def test_answers_are_read_in_both_published_forms(tmp_path, checkpoint, punkt):
    """A single question's answers may be in the list itself, as in the script's `_create_query_answer_pairs`."""
    one = {**ROW, "questions": ["Who?"], "answers": ["Ann", "Ann Lee"]}
    two = {**ROW, "answers": ["Paris", ["Rome"]]}
    file = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in (one, two)))
    items = find_task("memoryagentbench", {"data": file, "tokenizer": str(checkpoint)}).items()
    assert [list(item.answers) for item in items] == [["Ann", "Ann Lee"], ["Paris"], ["Rome"]]
