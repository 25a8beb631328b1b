"""Encoded episodes on disk: made once, memory-mapped, cached."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from deltamem_tool.data.cache import cache_key, cached_folder
from deltamem_tool.data.encode import IGNORED, EncodedEpisode, EncodedExchange, Encoder
from deltamem_tool.data.episode import Episode
from deltamem_tool.errors import ConfigError, DataError

Report = Callable[[int, int], None]  # episodes encoded, of how many

_FILE = "episodes.arrow"
_BATCH = 256  # episodes in a record batch
_EXCHANGES = pa.list_(pa.struct([("ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))]))
_SCHEMA = pa.schema(
    [
        ("write_ids", pa.list_(pa.int32())),
        ("tags", pa.list_(pa.int8())),
        ("exchanges", _EXCHANGES),
        ("recent", _EXCHANGES),
        ("full", _EXCHANGES),
        ("where", pa.string()),
        ("cut", pa.int32()),
    ]
)


@dataclass(frozen=True)
class TokenCounts:
    mean: float
    max: int
    total: int


@dataclass(frozen=True)
class EpisodeStatistics:
    episodes: int
    exchanges: int
    write_tokens: TokenCounts  # of a history, after the cut
    read_tokens: TokenCounts  # of an exchange, with nothing but the memory
    scored_tokens: int
    cut: int  # histories that were cut


class EncodedEpisodes(Dataset[EncodedEpisode]):
    """Encoded episodes as a memory-mapped table.

    Args:
        table: as `encode_cached` makes it.
        skipped: why episodes were left out.
        context_dropout: where episodes have a `recent` view, it is what is read; but with this probability the memory
            alone is. Drawn from the seed, the epoch and the episode's index.
        seed: of that.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        skipped: tuple[DataError, ...] = (),
        context_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= context_dropout <= 1:
            raise ConfigError(f"There is no context_dropout {context_dropout}.", "It is a share, 0 to 1.")
        self._table = table
        self.skipped = skipped
        self.context_dropout, self.seed, self.epoch = context_dropout, seed, 0

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> EncodedEpisode:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._table[index]
        views = {name: _exchanges(row[name]) for name in ("exchanges", "recent", "full")}
        if views["recent"] and random.Random(f"{self.seed}/{self.epoch}/{index}").random() >= self.context_dropout:
            views["exchanges"] = views["recent"]
        return EncodedEpisode(**{**row, **views})

    def set_epoch(self, epoch: int) -> None:
        """Which exchanges lose their recent turns changes with it."""
        self.epoch = epoch

    @property
    def lengths(self) -> list[int]:
        """Of each episode the tokens that are written, so that like lengths can share a batch."""
        return pc.list_value_length(self._column("write_ids")).to_pylist()

    def statistics(self) -> EpisodeStatistics:
        exchanges = pc.list_flatten(self._column("exchanges"))
        labels = pc.list_flatten(pc.struct_field(exchanges, "labels"))
        return EpisodeStatistics(
            episodes=len(self),
            exchanges=len(exchanges),
            write_tokens=_counts(pc.list_value_length(self._column("write_ids"))),
            read_tokens=_counts(pc.list_value_length(pc.struct_field(exchanges, "ids"))),
            scored_tokens=pc.sum(pc.not_equal(labels, IGNORED)).as_py(),
            cut=pc.sum(pc.greater(self._column("cut"), 0)).as_py(),
        )

    def _column(self, name: str) -> pa.ChunkedArray:
        return self._table.data.column(name)


def encode_cached(
    episodes: Sequence[Episode],
    encoder: Encoder,
    skip_bad_rows: bool = False,
    report: Report | None = None,
    context_dropout: float = 0.0,
    seed: int = 0,
) -> EncodedEpisodes:
    """Encode all episodes, or find them encoded already: in the cache directory of `datasets`, by `cache_key`.

    Args:
        skip_bad_rows: leave out episodes that cannot be encoded, and say so in `skipped`, rather than raise.
        report: called while episodes are encoded; not called when they are found.
        context_dropout, seed: of `EncodedEpisodes`.

    Raises:
        DataError: an episode cannot be encoded; it says which. With skip_bad_rows: none can.
    """

    def make(folder: Path) -> dict[str, Any]:
        return {"skipped": _write(folder / _FILE, episodes, encoder, skip_bad_rows, report)}

    folder, said = cached_folder(cache_key(episodes, encoder), make)
    skipped = tuple(DataError(*parts) for parts in said["skipped"])
    if skipped and not skip_bad_rows:  # made by a run that did skip them
        raise skipped[0]
    return EncodedEpisodes(datasets.Dataset.from_file(str(folder / _FILE)), skipped, context_dropout, seed)


def _write(
    path: Path, episodes: Sequence[Episode], encoder: Encoder, skip_bad_rows: bool, report: Report | None
) -> list[tuple[str, str, str]]:
    """Encode into an arrow file; returns the errors of what was skipped."""
    skipped, done = [], 0
    encoded = encoder.attempt(episodes)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as stream:
        while batch := list(islice(encoded, _BATCH)):
            bad = [each for each in batch if isinstance(each, DataError)]
            if bad and not skip_bad_rows:
                raise bad[0]
            skipped += [(error.what, error.why, error.next) for error in bad]
            rows = [_row(each) for each in batch if isinstance(each, EncodedEpisode)]
            stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
            done += len(batch)
            if report is not None:
                report(done, len(episodes))
    if len(skipped) == len(episodes):
        why = f"The first of {len(skipped)}: {skipped[0][0]} {skipped[0][1]}" if skipped else "There is none."
        raise DataError("No episode can be encoded.", why, "Correct the data, or use another tokenizer.")
    return skipped


def _row(episode: EncodedEpisode) -> dict[str, Any]:
    return {
        **vars(episode),
        **{name: [vars(each) for each in getattr(episode, name)] for name in ("exchanges", "recent", "full")},
    }


def _exchanges(rows: list[dict[str, list[int]]]) -> list[EncodedExchange]:
    return [EncodedExchange(**row) for row in rows]


def _counts(lengths: pa.ChunkedArray) -> TokenCounts:
    return TokenCounts(pc.mean(lengths).as_py(), pc.max(lengths).as_py(), pc.sum(lengths).as_py())
