"""Models for the tests of conversations."""

from __future__ import annotations

import pytest
from chat.talking import (
    make_engine,
)
from helpers.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(scope="module")
def stopping(engine):
    """Nearly every other token ends an answer, so that hardly one ends by its length."""
    return make_engine(frozenset(range(2, len(tiny_tokenizer()), 2)))
