"""Encoding in a separate process, for tests with several of them."""

from __future__ import annotations

import importlib
import os
import time
from multiprocessing.connection import Connection

import datasets
from helpers.tiny import tiny_tokenizer

from deltamem_tool.data.encode import Encoder
from deltamem_tool.data.store import encode_cached
from deltamem_tool.data.synthetic import DialogueEpisodes

EPISODES = 300


def encode(pipe: Connection, cache: str) -> None:
    """Begin when `pipe` says so, then send the reports and the lengths of the episodes."""
    os.environ["HF_DATASETS_CACHE"] = cache
    importlib.reload(datasets.config)  # which reads the environment when it is imported
    encoder = Encoder(tiny_tokenizer(), 100, 100)
    pipe.send("ready")
    pipe.recv()
    reports: list[tuple[int, int]] = []

    def report(*parts: int) -> None:
        reports.append(parts)
        time.sleep(0.2)  # so that the other process starts while this one is encoding

    episodes = encode_cached(list(DialogueEpisodes(EPISODES, 8, 0, 1, 3, 0.5)), encoder, report=report)
    pipe.send((reports, episodes.lengths))
