"""Encoded episodes on disk, stored by `datasets`: encoded once, memory-mapped, and reused."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, List, Value
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import Dataset

from deltamem_tool.data.encode import IGNORED, VIEWS, EncodedEpisode, EncodedExchange, Encoder
from deltamem_tool.data.episode import Episode
from deltamem_tool.errors import ConfigError, DataError

ENCODING_VERSION = 2  # goes up when `Encoder` gives other tokens for the same input, or the columns change

Report = Callable[[int, int], None]  # episodes encoded, of how many

_BATCH = 256  # episodes in memory at once
_TOKENS = List(Value("int32"))
_EXCHANGES = List({"ids": _TOKENS, "labels": _TOKENS})
_FEATURES = Features(
    {
        "write_ids": _TOKENS,
        "tags": List(Value("int8")),
        **dict.fromkeys(VIEWS, _EXCHANGES),
        "where": Value("string"),
        "cut": Value("int32"),
        "error": List(Value("string")),  # set for an episode that cannot be encoded; the other columns are then null
    }
)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of texts."""

    mean: float
    max: int
    total: int

    @classmethod
    def from_lengths(cls, lengths: pa.ChunkedArray) -> TokenCounts:
        """Count the texts of these lengths; nulls are left out."""
        return cls(pc.mean(lengths).as_py(), pc.max(lengths).as_py(), pc.sum(lengths).as_py())


@dataclass(frozen=True)
class EpisodeStatistics:
    """Sizes of a set of episodes."""

    episodes: int
    exchanges: int
    write_tokens: TokenCounts  # of a history, after the cut
    read_tokens: TokenCounts  # of an exchange, with nothing but the memory
    scored_tokens: int
    cut: int  # histories that were cut


class EncodedEpisodes(Dataset[EncodedEpisode]):
    """Encoded episodes as a memory-mapped table.

    Args:
        table: one row per episode. A row with an `error` is left out, and its error is in `skipped`.
        context_dropout: probability that an episode with a `recent` view is read with the memory alone instead. It
            depends on the seed, the epoch and the episode's index.
        seed: random seed of the context dropout.
    """

    def __init__(self, table: datasets.Dataset, context_dropout: float = 0.0, seed: int = 0) -> None:
        if not 0 <= context_dropout <= 1:
            raise ConfigError(
                f"context_dropout is {context_dropout}.", "It is a probability.", "Choose a number from 0 to 1."
            )
        errors = table.data.column("error")
        self.skipped = tuple(DataError(*parts) for parts in errors.drop_null().to_pylist())
        self._table = table.select(np.flatnonzero(errors.is_null())) if self.skipped else table
        self.context_dropout, self.seed, self.epoch = context_dropout, seed, 0

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> EncodedEpisode:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._table[index]
        del row["error"]
        row |= {view: [EncodedExchange(**exchange) for exchange in row[view]] for view in VIEWS}
        if row["recent"] and random.Random(f"{self.seed}/{self.epoch}/{index}").random() >= self.context_dropout:
            row["exchanges"] = row["recent"]
        return EncodedEpisode(**row)

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch. Which exchanges lose their recent turns depends on it."""
        self.epoch = epoch

    @property
    def lengths(self) -> list[int]:
        """Number of tokens that each episode writes, for batches of similar lengths."""
        lengths: list[int] = pc.list_value_length(self.column("write_ids")).drop_null().to_pylist()
        return lengths

    def statistics(self) -> EpisodeStatistics:
        """Count exchanges and tokens."""
        exchanges = pc.list_flatten(self.column("exchanges"))
        labels = pc.list_flatten(pc.struct_field(exchanges, "labels"))
        return EpisodeStatistics(
            episodes=len(self),
            exchanges=len(exchanges),
            write_tokens=TokenCounts.from_lengths(pc.list_value_length(self.column("write_ids"))),
            read_tokens=TokenCounts.from_lengths(pc.list_value_length(pc.struct_field(exchanges, "ids"))),
            scored_tokens=pc.sum(pc.not_equal(labels, IGNORED)).as_py(),
            cut=pc.sum(pc.greater(self.column("cut"), 0)).as_py(),
        )

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of the table, with null for skipped episodes."""
        return self._table.data.column(name)


def encode_cached(
    episodes: Sequence[Episode],
    encoder: Encoder,
    skip_bad_rows: bool = False,
    report: Report | None = None,
    context_dropout: float = 0.0,
    seed: int = 0,
) -> EncodedEpisodes:
    """Encode all episodes, or find them in the cache of `datasets`, by `encoding_fingerprint`.

    Processes that want the same episodes wait for the one that encodes them. A cache that cannot be read is rebuilt.

    Args:
        episodes: episodes to encode.
        encoder: the encoder.
        skip_bad_rows: leave out episodes that cannot be encoded, and say so in `skipped`, rather than raise.
        report: called while episodes are encoded; not called when they are found.
        context_dropout: of `EncodedEpisodes`.
        seed: of `EncodedEpisodes`.

    Raises:
        DataError: an episode cannot be encoded (the error names it); or with skip_bad_rows, none can.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "deltamem"
    fingerprint = encoding_fingerprint(episodes, encoder)

    def rows() -> Iterator[dict[str, Any]]:
        return _rows(episodes, encoder, skip_bad_rows, report)

    def load() -> datasets.Dataset:
        options: dict[str, Any] = {"fingerprint": fingerprint, "writer_batch_size": _BATCH}
        return datasets.Dataset.from_generator(rows, features=_FEATURES, cache_dir=str(folder), **options)

    try:
        try:
            table = load()
        except (pa.ArrowException, OSError) as error:  # of a table that was cut (which has no errno) or lost
            if getattr(error, "errno", None) not in (None, errno.ENOENT):
                raise
            _LOG.warning("The cache of encoded episodes is damaged and is rebuilt: %s", error)
            for damaged in folder.glob(f"generator/*{fingerprint}"):
                shutil.rmtree(damaged)
            table = load()
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from error
    encoded = EncodedEpisodes(table, context_dropout, seed)
    if encoded.skipped and not skip_bad_rows:  # made by a run that did skip them
        raise encoded.skipped[0]
    return encoded


def in_memory(
    episodes: Sequence[Episode] | Sequence[EncodedEpisode], encoder: Encoder, skip_bad_rows: bool = False
) -> EncodedEpisodes:
    """Encode a few episodes, if they are not, without the cache; arguments and errors as in `encode_cached`."""
    if episodes and isinstance(episodes[0], EncodedEpisode):
        rows = list(map(_row, cast(Sequence[EncodedEpisode], episodes)))
    else:
        rows = list(_rows(cast(Sequence[Episode], episodes), encoder, skip_bad_rows))
    columns = {name: [row.get(name) for row in rows] for name in _FEATURES}
    return EncodedEpisodes(datasets.Dataset.from_dict(columns, features=_FEATURES))


def encoding_fingerprint(episodes: Sequence[Episode], encoder: Encoder) -> str:
    """Hash all that decides the encoding with SHA-256: the tokenizer, the template, the options, every episode.

    `datasets` would hash pickled objects, and a tokenizer pickles differently after it has been used.
    """
    tokenizer = encoder.tokenizer
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("truncation", "padding"):  # set by whoever called it last
        vocabulary.pop(passing, None)
    parts: list[Any] = [
        ENCODING_VERSION,
        encoder.options(),
        type(tokenizer).__name__,
        vocabulary,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        getattr(tokenizer, "split_special_tokens", False),
        tokenizer.chat_template,
    ]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for episode in episodes:  # keys in their order: a template may write them in it
        content = (episode.history, episode.exchanges, episode.where, episode.template_kwargs)
        digest.update(json.dumps(content, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _row(episode: EncodedEpisode) -> dict[str, Any]:
    return vars(episode) | {view: [vars(exchange) for exchange in getattr(episode, view)] for view in VIEWS}


def _rows(
    episodes: Sequence[Episode], encoder: Encoder, skip_bad_rows: bool, report: Report | None = None
) -> Iterator[dict[str, Any]]:
    skipped: list[DataError] = []
    for done, encoded in enumerate(encoder.encode_each(episodes), start=1):
        if isinstance(encoded, EncodedEpisode):
            yield _row(encoded)
        elif skip_bad_rows:
            skipped.append(encoded)
            yield {"error": [encoded.what, encoded.why, encoded.next]}
        else:
            raise encoded
        if report is not None and (done % _BATCH == 0 or done == len(episodes)):
            report(done, len(episodes))
    if len(skipped) == len(episodes):
        why = f"The first of {len(skipped)}: {skipped[0].what} {skipped[0].why}" if skipped else "There is none."
        raise DataError("No episode can be encoded.", why, "Correct the data, or use another tokenizer.")
