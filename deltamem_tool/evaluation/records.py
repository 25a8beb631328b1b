"""The record of every question and answer, kept in a folder so that an interrupted evaluation can resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.processes import ALONE, Processes
from deltamem_tool.io.atomic import check_writable, file_lock, write_atomically
from deltamem_tool.io.names import expand_user
from deltamem_tool.io.safe_json import read_json

RECORDS_FILE, SETTINGS_FILE = "records.jsonl", "settings.json"
ITEMS = "items"  # among the settings: a digest of all that is asked


@dataclass(frozen=True)
class Record:
    """The answer to one question under one condition."""

    item: str
    history: str
    group: str
    condition: str
    question: str
    answer: str
    right: list[str]
    scores: dict[str, float]
    prompt_tokens: int


class RecordFolder:
    """A folder with `settings.json` and `records.jsonl`, which has one record per line, written as they come.

    Args:
        folder: folder, created with the first record. A run that is rejected before leaves nothing behind.
        settings: everything that an answer depends on. A folder with other settings is rejected.

    Raises:
        DataError: the folder belongs to another run.
        DeltaMemError: the folder cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder = expand_user(folder)
        self._settings = json.loads(json.dumps(settings))
        check_writable(folder / SETTINGS_FILE)
        self._check_settings()

    def read(self) -> list[Record]:
        """Return the records in the folder. An incomplete last line is ignored, and its question will be asked again.

        Raises:
            DataError: a line is not a record.
        """
        file = self.folder / RECORDS_FILE
        if not file.is_file():
            return []
        with file_lock(file):  # else another program may be in the middle of a line
            _remove_incomplete_line(file)
            return read_records(file)

    def add(self, records: Iterable[Record]) -> None:
        """Append records, and write the settings with the first of them.

        Raises:
            DataError: another program has begun an evaluation with other settings in the folder.
        """
        place = self.folder / SETTINGS_FILE
        with file_lock(place):
            self._check_settings()
            if not place.exists():
                write_atomically(place, (json.dumps(self._settings, indent=1) + "\n").encode())
            _remove_incomplete_line(self.folder / RECORDS_FILE)  # of another program that was killed
            with (self.folder / RECORDS_FILE).open("ab") as file:
                file.write(_lines(records))
                file.flush()
                os.fsync(file.fileno())

    def sort(self, records: Sequence[Record]) -> None:
        """Write these records first, in their order. All others follow, by condition and item."""
        file = self.folder / RECORDS_FILE
        with file_lock(self.folder / SETTINGS_FILE):
            _remove_incomplete_line(file)
            asked = {_key(record) for record in records}
            others = [record for record in read_records(file) if _key(record) not in asked]
            content = _lines([*records, *sorted(others, key=_key)])
            if content != file.read_bytes():
                write_atomically(file, content)

    def _check_settings(self) -> None:
        place, wanted = self.folder / SETTINGS_FILE, self._settings
        if place.is_file():
            stored = _settings(place)
            changed = sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key))
            if changed:
                raise DataError(
                    f"{self.folder} holds an evaluation with other settings.",
                    f"Its {', '.join(changed)} differ.",
                    "Choose another folder, or pass the same settings.",
                )
        elif (self.folder / RECORDS_FILE).exists():
            raise DataError(
                f"{self.folder} holds records of an unknown evaluation.",
                f"It has no {SETTINGS_FILE}.",
                "Choose another folder.",
            )


class Records:
    """Records by condition and item: those that a folder already has, and new ones.

    Args:
        folder: folder that keeps them; None keeps nothing. Several processes share one folder.
        settings: as in `RecordFolder`.
        processes: the processes of the evaluation. Existing records are those that the first process finds.

    Raises:
        DataError, DeltaMemError: as in `RecordFolder`, or a record in the folder is damaged.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], processes: Processes = ALONE) -> None:
        self._processes = processes
        self._kept = None if folder is None else RecordFolder(folder, settings)
        self._records: dict[tuple[str, str], Record] = {}
        stored = self._kept.read() if self._kept is not None and processes.is_main else []
        self._remember(processes.from_main(stored))

    def __contains__(self, condition_and_item: tuple[str, str]) -> bool:
        return condition_and_item in self._records

    def add(self, records: Iterable[Record]) -> int:
        """Add the records that are new, and return their number."""
        new = [record for record in records if _key(record) not in self]
        if self._kept is not None and (self._processes.share or self._processes.is_main):
            self._kept.add(new)
        self._remember(new)
        return len(new)

    def gather(self) -> None:
        """Take in the records that other processes have added."""
        for records in self._processes.all(list(self._records.values())):
            self._remember(records)

    def store_in_order(self, conditions: Iterable[str], items: Sequence[str]) -> list[Record]:
        """Return the records in this order, and store them so. Other records in the folder follow after them.

        The order in which they were added depends on which process was faster, and on where a run stopped.
        """
        records = self.select(conditions, items)
        if self._kept is not None and self._processes.is_main:
            self._kept.sort(records)
        return records

    def select(self, conditions: Iterable[str], items: Sequence[str]) -> list[Record]:
        """Return these records in order; all of them exist."""
        return [self._records[condition, item] for condition in conditions for item in items]

    def _remember(self, records: Iterable[Record]) -> None:
        self._records |= {_key(record): record for record in records}


def _remove_incomplete_line(file: Path) -> None:
    """Cut what follows the last line feed of a file, which the caller has locked."""
    if not file.exists() or file.stat().st_size == 0:
        return
    with file.open("rb") as content:
        content.seek(-1, os.SEEK_END)
        if content.read() == b"\n":  # as nearly always: what comes before need not be read
            return
    os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


def _key(record: Record) -> tuple[str, str]:
    return record.condition, record.item


def _lines(records: Iterable[Record]) -> bytes:
    return b"".join(json.dumps(asdict(record)).encode() + b"\n" for record in records)


def read_records(file: Path) -> list[Record]:
    """Read one record per line. If several are for one question, as when two programs write at once, the last wins.

    Raises:
        DataError: a line is not a record.
    """
    lines = file.read_bytes().splitlines()
    records = [_record(line, f"{file} line {number}") for number, line in enumerate(lines, start=1)]
    return list({_key(record): record for record in records}.values())


def _settings(place: Path) -> dict[str, Any]:
    try:
        stored = read_json(place)
    except ValueError as error:
        raise DataError(f"{place} is damaged.", f"{error}.", "Choose another folder.") from error
    if not isinstance(stored, dict):
        raise DataError(f"{place} is damaged.", "It contains no settings.", "Choose another folder.")
    return stored


def _record(line: bytes, where: str) -> Record:
    try:
        return Record(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(f"{where} is not a record.", f"{error}.", "Choose another folder.") from error
