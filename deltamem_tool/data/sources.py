"""Where rows come from: a JSONL file, a parquet file, a dataset of the Hub."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from deltamem_tool.data.episode import Episode, episodes_of
from deltamem_tool.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_AS_PUBLISHED = "Use the file as its authors publish it."
_SPEECH = ("messages", "prompt", "response", "completion", "history")  # columns that can be lists of messages
# What `datasets` raises over a dataset, a network or a file that is not as it should be.
_FAILURES = (DatasetsError, OSError, ValueError, RuntimeError)

Row = tuple[str, Any]  # where it is, and what it holds, or the DataError that says why it cannot be read


@dataclass(frozen=True)
class Loaded:
    """What was read: the episodes of `rows` rows, without those of `skipped`."""

    episodes: list[Episode]
    rows: int
    skipped: tuple[DataError, ...] = ()


def read_episodes(
    path: str | Path,
    split: str = "train",
    revision: str | None = None,
    supervise: str = "last",
    skip_bad_rows: bool = False,
) -> Loaded:
    """All episodes of a file, or of a dataset of the Hub.

    Args:
        path: a JSONL or parquet file, or a dataset's id.
        split: of a dataset of the Hub, as `datasets` takes it: also "train[:1000]".
        revision: of a dataset of the Hub.
        supervise: "last" or "all", as in `episodes_of`.
        skip_bad_rows: leave out rows that are no conversations, and say so in `skipped`, rather than raise.

    Raises:
        DataError: nothing can be read, or a row cannot be used; the error says which.
    """
    episodes: list[Episode] = []
    skipped: list[DataError] = []
    count = 0
    for where, row in _rows(path, split, revision):
        count += 1
        try:
            if isinstance(row, DataError):
                raise row
            episodes += episodes_of(row, where, supervise)
        except DataError as error:
            if not skip_bad_rows:
                raise
            skipped.append(error)
    if not episodes:
        why = f"All of its {count} rows are bad; the first: {skipped[0].what}" if skipped else "It is empty."
        raise DataError(f"{path} holds no conversation.", why, "Use another file.")
    return Loaded(episodes, count, tuple(skipped))


def read_rows(
    name: str | Path,
    what: str = "row",
    config: str | None = None,
    split: str | None = None,
    usual: tuple[str | None, Sequence[str]] = (None, ("train",)),
) -> list[Row]:
    """Every row of a file here, of a dataset's folder here, or of a dataset of the Hub; each with where it is.

    Args:
        name: a JSON file that is one list, a .jsonl or a .parquet file; a folder that `datasets` loads; OWNER/NAME or
            OWNER/NAME@REVISION. What is here comes first.
        what: what a row is called in errors.
        config: of a folder or of the Hub, if not the usual one.
        split: likewise, as `datasets` takes it.
        usual: config and splits of the dataset where it is published.

    Raises:
        DataError: nothing is there, or nothing in it can be read.
    """
    path = Path(name)
    if path.is_dir() or (not path.exists() and _is_on_hub(str(name))):
        rows = _dataset_rows(str(name), config or usual[0], [split] if split else usual[1], what)
    else:
        if config or split:
            raise DataError(f"{name} has no config and no split.", "It is a file.", "Leave them out.")
        rows = _file_rows(path, what)
    if not rows:
        raise DataError(f"{name} is no list with entries.", "It is empty.", _AS_PUBLISHED)
    return rows


def _is_on_hub(name: str) -> bool:
    repository = name.partition("@")[0]
    is_file = Path(name).suffix.lower() in (".json", *_READERS)
    return "/" in repository and not is_file and _HUB_ID.fullmatch(repository) is not None


def _file_rows(path: Path, what: str) -> list[Row]:
    reader = _READERS.get(path.suffix.lower())
    if not path.is_file():
        raise DataError(f"There is no data file {path}.", "Nor is it a dataset's id, OWNER/NAME.", "Correct the path.")
    if reader is None:
        try:
            entries = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON.", f"{_line(error)}", _AS_PUBLISHED) from error
        if not isinstance(entries, list):
            raise DataError(f"{path} is no list with entries.", f"It is a {type(entries).__name__}.", _AS_PUBLISHED)
        return [(f"{path} {what} {number}", entry) for number, entry in enumerate(entries, start=1)]
    rows = [row for _, row in (reader(path) if reader is _json_rows else _parquet_rows(path, speech=False))]
    for row in rows:
        if isinstance(row, DataError):
            raise row
    return [(f"{path} {what} {number}", row) for number, row in enumerate(rows, start=1)]


def _dataset_rows(name: str, config: str | None, splits: Sequence[str], what: str) -> list[Row]:
    """Of a folder here or of the Hub."""
    place, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    return [
        (f"{name}[{split}] {what} {number}", row)
        for split in splits
        for number, (_, row) in enumerate(_hub_rows(place, split, revision or None, config, speech=False), start=1)
    ]


def _rows(path: str | Path, split: str, revision: str | None) -> Iterator[Row]:
    file = Path(path)
    reader = _READERS.get(file.suffix.lower())
    if not file.exists() and reader is None and _HUB_ID.fullmatch(str(path)):
        return _hub_rows(str(path), split, revision)
    if not file.exists():
        raise DataError(f"There is no data file {path}.", "", "Correct the path in the recipe.")
    if reader is None or not file.is_file():
        raise DataError(
            f"{path} is no data file that can be read.",
            f"Taken are files {' and '.join(_READERS)}, and ids of datasets on the Hub.",
            "Save the conversations as JSON lines, and name the file .jsonl.",
        )
    if revision is not None or split != "train":
        raise DataError(
            f"{path} has no split and no revision.", "It is a file.", "Leave them out, or give a dataset of the Hub."
        )
    return reader(file)


def _json_rows(path: Path) -> Iterator[Row]:
    # A line ends with a line feed alone: str.splitlines() would cut at U+2028, which JSON allows in text.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                text = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
                if text.strip():
                    yield where, json.loads(text)
            except UnicodeDecodeError as error:
                yield where, DataError(f"{where} is not UTF-8.", f"{error}.", "Save the file as UTF-8.")
            except (ValueError, RecursionError) as error:
                yield (
                    where,
                    DataError(f"{where} is not JSON.", f"{error}.", "Correct the line: one JSON object a line."),
                )


def _parquet_rows(path: Path, speech: bool = True) -> Iterator[Row]:
    try:
        # Streamed, so that nothing is copied to a cache; by `datasets`, which knows JSON columns of its own.
        # The batch size is the first row group's otherwise, and that may be empty.
        options = {"split": "train", "streaming": True, "batch_size": 1000}
        table = datasets.load_dataset("parquet", data_files=_literal(path), **options)
        yield from _table_rows(table, f"{path} row", speech)
    except _FAILURES as error:
        raise DataError(f"{path} is no parquet file.", _line(error), "Save it again, or use another file.") from error


def _literal(path: Path) -> str:
    """The path as a pattern of `datasets`, where brackets and stars mean something."""
    return re.sub(r"([*?[])", r"[\1]", str(path.resolve()))


_READERS = {".jsonl": _json_rows, ".parquet": _parquet_rows}


def _hub_rows(
    name: str, split: str, revision: str | None, config: str | None = None, speech: bool = True
) -> Iterator[Row]:
    try:
        table = datasets.load_dataset(name, config, split=split, revision=revision)
    except DatasetNotFoundError as error:
        raise DataError(
            f"There is no data file {name}, and no such dataset on the Hub.",
            _line(error),
            "Correct the path, the id or the revision; log in with `hf auth login` if the dataset is private.",
        ) from error
    except _FAILURES as error:
        splits = _splits(name, config, revision)
        if splits and re.split(r"[\[+]", split)[0] not in splits:
            raise DataError(
                f"The dataset {name} has no split {split!r}.",
                f"Its splits are {', '.join(splits)}.",
                "Name one of them.",
            ) from error
        raise DataError(
            f"The dataset {name} cannot be loaded.",
            _line(error),
            "Try again, or save it as a .jsonl or .parquet file and give that.",
        ) from error
    yield from _table_rows(table, f"{name}[{split}] row", speech)


def _splits(name: str, config: str | None, revision: str | None) -> list[str]:
    try:
        return list(datasets.get_dataset_split_names(name, config, revision=revision))
    except _FAILURES:
        return []  # the error that made us ask says why


def _line(error: BaseException) -> str:
    """What went wrong in one line; `datasets` often says why in the cause alone."""
    texts = [" ".join(str(each).split()) for each in (error, error.__cause__) if each is not None]
    said = "; ".join(text.rstrip(".") for text in texts if text)
    return f"{said or type(error).__name__}."[:500]


def _table_rows(table: datasets.Dataset | datasets.IterableDataset, where: str, speech: bool) -> Iterator[Row]:
    """Without columns that are null; with `speech`, of conversations alone."""
    wanted = [name for name in table.column_names or () if speech and name in _SPEECH]
    if wanted:
        table = table.select_columns(wanted)  # others may be pictures, long to decode
    for number, row in enumerate(table, start=1):
        said = {name: value for name, value in row.items() if value is not None}
        for name in _SPEECH if speech else ():
            if isinstance(said.get(name), list):
                said[name] = [_message(message) for message in said[name]]
        yield f"{where} {number}", said


def _message(message: Any) -> Any:
    """A message of a table, whose columns give every message the keys of all: those that are null were not said."""
    if not isinstance(message, dict):
        return message
    return {key: _without_nulls(value) for key, value in message.items() if value is not None or key == "content"}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
