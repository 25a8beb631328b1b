"""Retrieval with BM25: find the passages of a conversation that share words with a question."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from deltamem_tool.errors import ConfigError


def rank(passages: Sequence[str], question: str) -> list[int]:
    """Return the indices of the passages, best first, without those that share no word with the question.

    Raises:
        ConfigError: bm25s is not installed.
    """
    index = _index(tuple(passages))
    words = _words(question)
    if index is None or not words:
        return []
    scores = index.get_scores(words)
    return [number for number in sorted(range(len(passages)), key=lambda n: -scores[n]) if scores[number] > 0]


@lru_cache(maxsize=32)  # many questions share a conversation
def _index(passages: tuple[str, ...]) -> Any:
    """Build the index of the passages; None if no passage has a word."""
    words = [_words(passage) for passage in passages]
    if not any(words):
        return None
    index = _bm25s().BM25()
    index.index(words, show_progress=False)
    return index


def _words(text: str) -> list[str]:
    words: list[str] = _bm25s().tokenize([text], return_ids=False, show_progress=False)[0]
    return words


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ConfigError("BM25 needs the package bm25s.", f"{error}.", "pip install 'deltamem-tool[eval]'.") from error
    return bm25s
