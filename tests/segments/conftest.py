"""Tokenizers that know the special tokens of all templates, and a tiny model that writes by messages."""

from __future__ import annotations

import pytest
from helpers.tiny import patched_model, tiny_tokenizer
from segments.merges import trained
from segments.templates import TOKENS
from tokenizers import AddedToken, pre_tokenizers


@pytest.fixture(scope="session")
def special_tokenizer():
    """The tiny tokenizer with the special tokens of all templates; read only."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    return tokenizer


@pytest.fixture(scope="session")
def merging_tokenizer():
    """Like `special`, with merges: a space is in the token of the word after it, as in real tokenizers; read only."""
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_special_tokens({"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<unk>"})
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Rex. Dr. Smith")["input_ids"])
    assert tokens == ["Rex", ".", "ĠDr", ".", "ĠSmith"]
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return patched_model(granularity="message")
