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
def stopping_engine(engine):
    """Almost every second token ends an answer, so that hardly any answer reaches its maximum length."""
    return make_engine(frozenset(range(2, len(tiny_tokenizer()), 2)))
