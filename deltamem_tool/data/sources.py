"""Read rows from a JSONL file, a parquet file, or a dataset on the Hub."""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from deltamem_tool.data.episode import Episode, episodes_of, exchange_of, used_columns
from deltamem_tool.errors import DataError
from deltamem_tool.io.names import expand_name, expand_user
from deltamem_tool.segments.messages import Message

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_AS_PUBLISHED = "Use the file as its authors publish it."
# The columns of which episodes are made; all but the last can be lists.
_COLUMNS = ("messages", "prompt", "response", "completion", "history", "tools", "chat_template_kwargs")
_LOG = logging.getLogger(__name__)
# Errors that `datasets` raises if a dataset, the network or a file is faulty.
_FAILURES = (DatasetsError, OSError, ValueError, RuntimeError)

Row = tuple[str, Any]  # the row's place, and its content or the DataError that says why it cannot be read


@dataclass(frozen=True)
class LoadedEpisodes:
    """The episodes of `rows` rows, without the rows that were skipped, and the errors of these."""

    episodes: list[Episode]
    rows: int
    skipped: tuple[DataError, ...] = ()


def read_episodes(
    path: str | Path,
    split: str = "train",
    revision: str | None = None,
    supervise: str = "last",
    skip_bad_rows: bool = False,
) -> LoadedEpisodes:
    """Read all episodes of a file, or of a dataset of the Hub. Columns that are not used are named in the log.

    Args:
        path: a JSONL or parquet file, or a dataset's id.
        split: split of a dataset on the Hub, in the syntax of `datasets`, such as "train[:1000]".
        revision: revision of a dataset on the Hub.
        supervise: "last" or "all", as in `episodes_of`.
        skip_bad_rows: leave out rows that are not conversations, and list them in `skipped`, rather than raise.

    Raises:
        DataError: the data cannot be read, or a row cannot be used; the error names it.
    """
    episodes: list[Episode] = []
    skipped: list[DataError] = []
    unused: dict[str, None] = {}  # in their order
    count = 0
    for where, row in _conversations(path, split, revision):
        count += 1
        try:
            if isinstance(row, DataError):
                raise row
            episodes += episodes_of(row, where, supervise)
            unused.update(dict.fromkeys(name for name in row if name not in used_columns(row)))
        except DataError as error:
            if not skip_bad_rows:
                raise
            skipped.append(error)
    if not episodes:
        why = f"All of its {count} rows are invalid; the first: {skipped[0].what}" if skipped else "It is empty."
        raise DataError(f"{path} has no conversations.", why, "Use another file.")
    if unused:
        _LOG.warning("%s has columns that are not used: %s.", path, ", ".join(map(str, unused)))
    return LoadedEpisodes(episodes, count, tuple(skipped))


def read_exchanges(path: str | Path) -> list[tuple[str, list[Message]]]:
    """Read conversations that are read as they are, with no history before them: the place of each, and its messages.

    Args:
        path: as of `read_episodes`.

    Raises:
        DataError: the data cannot be read, or a row is not a conversation that ends with the assistant's message.
    """
    exchanges = []
    for where, row in _conversations(path, "train", None):
        if isinstance(row, DataError):
            raise row
        exchanges.append((where, exchange_of(row, where)))
    if not exchanges:
        raise DataError(f"{path} has no conversations.", "It is empty.", "Use another file.")
    return exchanges


def read_rows(
    name: str | Path,
    what: str = "row",
    config: str | None = None,
    split: str | None = None,
    usual: tuple[str | None, Sequence[str]] = (None, ("train",)),
) -> list[Row]:
    """Read every row of a local file or folder, or of a dataset of the Hub; each with its place.

    Args:
        name: a JSON file that is one list, a .jsonl or a .parquet file; a folder that `datasets` loads; OWNER/NAME or
            OWNER/NAME@REVISION. Local files come first.
        what: what a row is called in errors.
        config: of a folder or of the Hub, if not the usual one.
        split: likewise, as `datasets` takes it.
        usual: config and splits of the dataset where it is published.

    Raises:
        DataError: the file or dataset does not exist, or cannot be read.
    """
    name = expand_name(name)
    path, reader = Path(name), _READERS.get(Path(name).suffix.lower())
    rows: list[Row] = []
    if path.is_dir() or (not path.exists() and _is_on_hub(str(name))):
        place, _, revision = (str(name), "", "") if path.is_dir() else str(name).partition("@")
        for each in [split] if split else usual[1]:
            table = _dataset_rows(place, each, revision or None, config or usual[0], columns=None)
            rows += [(f"{name}[{each}] {what} {n}", row) for n, (_, row) in enumerate(table, start=1)]
    elif config or split:
        raise DataError(f"{name} has no config and no split.", "It is a file.", "Leave them out.")
    elif not path.is_file():
        why = "It is not a dataset's id, OWNER/NAME, either."
        raise DataError(f"There is no data file {path}.", why, "Correct the path.")
    else:
        if reader is None:
            entries = _json_list(path)
        else:
            entries = [row for _, row in (reader(path) if reader is _json_rows else _parquet_rows(path, None))]
        for entry in entries:
            if isinstance(entry, DataError):
                raise entry
        rows = [(f"{path} {what} {n}", entry) for n, entry in enumerate(entries, start=1)]
    if not rows:
        raise DataError(f"{name} has no entries.", "It is empty.", _AS_PUBLISHED)
    return rows


def _is_on_hub(name: str) -> bool:
    repository = name.partition("@")[0]
    is_file = Path(name).suffix.lower() in (".json", *_READERS)
    return "/" in repository and not is_file and _HUB_ID.fullmatch(repository) is not None


def _json_list(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON.", f"{_line(error)}", _AS_PUBLISHED) from error
    if not isinstance(entries, list):
        raise DataError(f"{path} is not a JSON list.", f"It is a {type(entries).__name__}.", _AS_PUBLISHED)
    return entries


def _conversations(path: str | Path, split: str, revision: str | None) -> Iterator[Row]:
    file = expand_user(path)
    reader = _READERS.get(file.suffix.lower())
    if not file.exists() and reader is None and _HUB_ID.fullmatch(str(path)):
        return _dataset_rows(str(path), split, revision)
    if not file.exists():
        raise DataError(f"There is no data file {path}.", "", "Correct the path in the recipe.")
    if reader is None or not file.is_file():
        raise DataError(
            f"{path} is not a supported data file.",
            f"Supported are {' and '.join(_READERS)} files, and ids of datasets on the Hub.",
            "Save the conversations as JSON lines, and name the file .jsonl.",
        )
    check_file_options(path, split, revision)
    return reader(file)


def check_file_options(path: str | Path, split: str, revision: str | None) -> None:
    """Check that options of a dataset on the Hub are not given for a file.

    Raises:
        DataError: they are.
    """
    if revision is not None or split != "train":
        raise DataError(
            f"{path} has no split and no revision.", "It is a file.", "Leave them out, or use a dataset on the Hub."
        )


def _json_rows(path: Path) -> Iterator[Row]:
    # A line ends with a line feed alone: str.splitlines() would cut at U+2028, which JSON allows in text.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                text = line.removeprefix(codecs.BOM_UTF8).decode()  # also where files were put together
                if text.strip():
                    yield where, json.loads(text)
            except UnicodeDecodeError as error:
                yield where, DataError(f"{where} is not UTF-8.", f"{error}.", "Save the file as UTF-8.")
            except (ValueError, RecursionError) as error:
                yield where, DataError(f"{where} is not JSON.", f"{error}.", "Write one JSON object per line.")


def _parquet_rows(path: Path, columns: Sequence[str] | None = _COLUMNS) -> Iterator[Row]:
    literal = re.sub(r"([*?[])", r"[\1]", str(path.resolve()))  # in patterns brackets and stars mean something
    try:
        # Streamed, so that nothing is copied to a cache; by `datasets`, which knows JSON columns of its own.
        # The batch size is the first row group's otherwise, and that may be empty.
        options: dict[str, Any] = {"split": "train", "streaming": True, "batch_size": 1000}
        yield from _table_rows(datasets.load_dataset("parquet", data_files=literal, **options), f"{path} row", columns)
    except _FAILURES as error:
        raise DataError(
            f"{path} is not a parquet file.", _line(error), "Save it again, or use another file."
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _json_rows, ".parquet": _parquet_rows}


def _dataset_rows(
    name: str,
    split: str,
    revision: str | None,
    config: str | None = None,
    columns: Sequence[str] | None = _COLUMNS,
) -> Iterator[Row]:
    """Return the rows of a folder that `datasets` loads, or of a dataset of the Hub."""
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
                "Use one of them.",
            ) from error
        raise DataError(
            f"The dataset {name} cannot be loaded.",
            _line(error),
            "Try again, or save it as a .jsonl or .parquet file and use that.",
        ) from error
    yield from _table_rows(table, f"{name}[{split}] row", columns)


def _splits(name: str, config: str | None, revision: str | None) -> list[str]:
    try:
        return list(datasets.get_dataset_split_names(name, config, revision=revision))
    except _FAILURES:
        return []  # the error that made us ask says why


def _line(error: BaseException) -> str:
    """Return the error in one line; `datasets` often gives the reason only in the cause."""
    texts = [" ".join(str(each).split()) for each in (error, error.__cause__) if each is not None]
    reasons = "; ".join(text.rstrip(".") for text in texts if text)
    return f"{reasons or type(error).__name__}."[:500]


def _table_rows(
    table: datasets.Dataset | datasets.IterableDataset, where: str, columns: Sequence[str] | None
) -> Iterator[Row]:
    """Yield the rows without null columns. If the table has any of `columns`, others are given by name only."""
    names = table.column_names or []
    wanted = [name for name in names if columns and name in columns]
    if wanted:
        table = table.select_columns(wanted)  # others may be pictures, long to decode
    unread = dict.fromkeys(name for name in names if wanted and name not in wanted)
    for number, row in enumerate(table, start=1):
        content = {name: value for name, value in row.items() if value is not None}
        for name in wanted:
            value = content.get(name)
            if value is not None:
                content[name] = [_message(each) for each in value] if isinstance(value, list) else _without_nulls(value)
        yield f"{where} {number}", content | unread


def _message(message: Any) -> Any:
    """Return a message without null keys, which a table adds if another message has the key."""
    if not isinstance(message, dict):
        return message
    return {key: _without_nulls(value) for key, value in message.items() if value is not None or key == "content"}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
