"""The folder of records when two programs write to it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.records import RECORDS_FILE, Record, RecordFolder

RECORD = Record("one", "history", "", "state", "Who?", "Ann", ["Ann"], {"exact": 1.0}, 7)


def test_records_of_other_settings_raise(tmp_path):
    """Both begin in a folder that does not exist."""
    first, second = (RecordFolder(tmp_path / "records", {"seed": seed}) for seed in (1, 2))
    first.add([RECORD])
    with pytest.raises(DataError, match="other settings"):
        second.add([replace(RECORD, answer="Ben")])
    assert first.read() == [RECORD]


def test_a_question_asked_by_two_programs_counts_once(tmp_path):
    first, second = (RecordFolder(tmp_path / "records", {"seed": 1}) for _ in range(2))
    for folder, item in ((first, "one"), (second, "one"), (second, "two")):
        folder.add([replace(RECORD, item=item)])
    assert [record.item for record in first.read()] == ["one", "two"]


def test_records_are_sorted_at_the_end(tmp_path):
    """Covers records in any order, and those that another program has added."""
    folder = RecordFolder(tmp_path / "records", {"seed": 1})
    one, two, three = (replace(RECORD, item=item) for item in ("one", "two", "three"))
    other = replace(RECORD, condition="zero_state")
    folder.add([three, other, one, two])
    folder.sort([one, two])
    assert folder.read() == [one, two, three, other]
    content = (tmp_path / "records" / RECORDS_FILE).read_bytes()
    folder.sort([one, two])
    assert (tmp_path / "records" / RECORDS_FILE).read_bytes() == content
