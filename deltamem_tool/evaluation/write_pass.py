"""Histories written into memories: sessions one after the other, each in a context of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool.errors import DataError
from deltamem_tool.evaluation import BATCH_SIZE
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.segments.encode import ChatTokens, encode_chat
from deltamem_tool.segments.template import Message

CHUNK = 4096  # tokens of one call: what a long session takes in memory at once


@torch.no_grad()
def memorise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    histories: Sequence[Sequence[Sequence[Message]]],
    batch_size: int = BATCH_SIZE,
    report: Callable[[int, int], None] | None = None,
    places: Sequence[str] | None = None,
    positions: int | None = None,
) -> MemoryState:
    """The memory after each history, a row a history.

    Args:
        histories: sessions of messages. The memory goes from session to session, the context does not.
        report: called with (histories written, of).
        places: file and place of each history, for errors.
        positions: how many the model has; None if it has no limit.

    Raises:
        DataError: a session has more tokens than that; nothing has been written then.
    """
    names = places or [f"history {number}" for number in range(1, len(histories) + 1)]
    if positions is not None:
        _refuse_long(tokenizer, histories, names, positions)
    memories = [adapter_of(model).empty_memory(1) for _ in histories]
    for start in range(0, len(histories), batch_size):
        rows = range(start, min(start + batch_size, len(histories)))
        for number in range(max(len(histories[row]) for row in rows)):
            some = [row for row in rows if number < len(histories[row])]
            sessions = [histories[row][number] for row in some]
            chat = _encoded(model, tokenizer, sessions)
            after = _written(model, chat, MemoryState.stack([memories[row] for row in some]))
            for position, row in enumerate(some):
                memories[row] = after.select([position])
        if report is not None:
            report(rows.stop, len(histories))
    return MemoryState.stack(memories)


def _encoded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sessions: Sequence[Any]) -> ChatTokens:
    # Padded on the right: the first chunk of a short session on the left would be padding alone, with nothing to see.
    return encode_chat(tokenizer, sessions, adapter_of(model).config.granularity, padding_side="right")


def _refuse_long(
    tokenizer: PreTrainedTokenizerBase,
    histories: Sequence[Sequence[Sequence[Message]]],
    names: Sequence[str],
    positions: int,
) -> None:
    """Before any is written: the last history may be the long one, hours later."""
    for name, history in zip(names, histories, strict=True):
        for number, session in enumerate(history, start=1):
            length = encode_chat(tokenizer, [session], "token").input_ids.shape[1]
            if length > positions:
                raise DataError(
                    f"{name}: session {number} of its history is too long for the model: {length} tokens.",
                    f"It has {positions} positions.",
                    "Split the session, or use a model with more positions.",
                )


def _written(model: PreTrainedModel, chat: ChatTokens, memory: MemoryState) -> MemoryState:
    """`memory` after one session each, in chunks."""
    cache = MemoryCache(model, memory)
    cache.segment_tags = chat.segment_tags
    ids, mask = chat.input_ids.to(model.device), chat.attention_mask.to(model.device)
    for start in range(0, ids.shape[1], CHUNK):
        end = start + CHUNK
        model.base_model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
    assert cache.memory is not None  # it began with one
    return cache.memory
