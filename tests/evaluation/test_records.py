"""The folder of records when two programs write to it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deltamem_tool.errors import DataError, DeltaMemError
from deltamem_tool.evaluation import records
from deltamem_tool.evaluation.records import RECORDS_FILE, Record, RecordFolder, read_records
from deltamem_tool.io.atomic import exclusive_lock

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


def test_a_program_that_was_killed_while_it_wrote_does_not_spoil_the_records_of_another(tmp_path):
    folder, file = RecordFolder(tmp_path / "records", {"seed": 1}), tmp_path / "records" / RECORDS_FILE
    one, three = (replace(RECORD, item=item) for item in ("one", "three"))
    folder.add([one])
    file.write_bytes(file.read_bytes() + b'{"item": "tw')
    folder.add([three])
    file.write_bytes(file.read_bytes() + b'{"item": "tw')
    folder.sort([three, one])
    assert folder.read() == [three, one]


def test_records_are_read_while_no_other_program_writes(tmp_path, monkeypatch):
    folder = RecordFolder(tmp_path / "records", {"seed": 1})
    folder.add([RECORD])

    def read_and_try(file):
        with pytest.raises(DeltaMemError, match="Another program is writing"), exclusive_lock(file.parent):
            pass
        return read_records(file)

    monkeypatch.setattr(records, "read_records", read_and_try)
    assert folder.read() == [RECORD]


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
