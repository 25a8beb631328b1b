"""Encode chats as the tensors of one call: token ids, masks, and segment tags for memories that write by segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deltamem_tool.config import GRANULARITIES
from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.segments.boundaries import WITHOUT_TAGS, Split, english, spans_of, tags_of
from deltamem_tool.segments.tags import SegmentTag
from deltamem_tool.segments.template import ChatTemplate, Message

PADDING_SIDES = ("left", "right")
# Arguments of the tokenizer for rendered text: the template has already written the special tokens.
RENDERED = {"add_special_tokens": False, "split_special_tokens": False, "verbose": False}


@dataclass(frozen=True)
class ChatTokens:
    """Conversations as the tensors of one model call. Padding has mask 0 and tag SegmentTag.OUTSIDE."""

    input_ids: Tensor  # int64 [B, T]
    attention_mask: Tensor  # int64 [B, T]
    segment_tags: Tensor | None  # int8 [B, T]; None at granularity "token", where every token writes


class TaggedChat(NamedTuple):
    """One conversation: its rendered text, and its token ids and tags, both of length T."""

    text: str
    input_ids: list[int]
    tags: list[int]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Message] | Sequence[Sequence[Message]],
    granularity: str = "message",
    add_generation_prompt: bool = False,
    padding_side: str = "left",
    split: Split | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> ChatTokens:
    """Encode one conversation (B = 1) or several as token ids, masks and segment tags `[B, T]`.

    Args:
        tokenizer: a tokenizer with a chat template. It must be a fast one, unless granularity is "token".
        conversations: a list of messages, or a list of such lists.
        granularity: "token", "message" or "sentence".
        add_generation_prompt: end with the header of the assistant's next message.
        padding_side: "left" or "right". The padding token is used, or the end token if there is none.
        split: function that splits a message's content for "sentence", as in `tag_chat`.
        template_kwargs: further arguments for the chat template, such as `tools`, or variables of its own.

    Raises:
        ConfigError: an option has an invalid value.
        DataError: there is nothing to encode, or no token to pad with; or an error of `tag_chat`.

    Example:
        >>> import deltamem_tool as deltamem
        >>> from transformers import AutoTokenizer
        >>> model = deltamem.load("builtin:adapter")
        >>> tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        >>> chat = deltamem.encode_chat(tokenizer, [{"role": "user", "content": "My dog is Rex."}])
        >>> chat.input_ids.shape == chat.segment_tags.shape
        True
    """
    if padding_side not in PADDING_SIDES:
        raise ConfigError(f"Unknown padding side {padding_side!r}.", f"It is one of {', '.join(PADDING_SIDES)}.")
    if not conversations:
        raise DataError("There is no conversation to encode.", "The list is empty.", "Give it at least one message.")
    single = isinstance(conversations[0], Mapping)
    batch = cast(Sequence[Sequence[Message]], [conversations] if single else conversations)
    template = ChatTemplate.from_tokenizer(tokenizer).with_kwargs(template_kwargs or {})
    rows = []
    for number, messages in enumerate(batch, start=1):
        try:
            rows.append(tag_messages(tokenizer, template, messages, granularity, add_generation_prompt, split))
        except DataError as error:
            where = "" if single else f"Conversation {number}: "
            raise DataError(where + error.what, error.why, error.next) from error
    return batch_chats(tokenizer, rows, granularity, padding_side)


def batch_chats(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[TaggedChat], granularity: str, padding_side: str
) -> ChatTokens:
    """Batch tagged conversations, as `encode_chat` does."""
    ids = [row.input_ids for row in rows]
    tags = [row.tags for row in rows]
    return ChatTokens(
        input_ids=pad_rows(ids, pad_token(tokenizer, ids), padding_side, torch.int64),
        attention_mask=pad_rows([[1] * len(row) for row in ids], 0, padding_side, torch.int64),
        segment_tags=None if granularity == "token" else pad_rows(tags, SegmentTag.OUTSIDE, padding_side, torch.int8),
    )


def tag_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    granularity: str,
    add_generation_prompt: bool = False,
    split: Split | None = None,
) -> TaggedChat:
    """Encode one conversation as text, token ids and tags.

    At granularity "token", every token is tagged SegmentTag.LAST.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: the conversation.
        granularity: "token", "message" or "sentence".
        add_generation_prompt: end with the header of the assistant's next message.
        split: function that takes the content as rendered (templates may strip it) and returns its sentences in order;
            English rules by default. Text between two sentences joins the first of them, and so does a sentence of
            whitespace. Content that is blank or not a string (None, a list of parts) is one sentence.

    Raises:
        ConfigError: `granularity` is unknown, or `split` is given but nothing is split.
        DataError: there is no message or no chat template; the tokenizer has no character offsets; the template rejects
            the conversation, or does not show where a message ends; a message or a sentence has no token of its own; or
            `split` returns text that is not in the content.
    """
    return tag_messages(
        tokenizer, ChatTemplate.from_tokenizer(tokenizer), messages, granularity, add_generation_prompt, split
    )


def tag_messages(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: Sequence[Message],
    granularity: str,
    generation_prompt: bool = False,
    split: Split | None = None,
) -> TaggedChat:
    """Tag a conversation as `tag_chat` does, with a `ChatTemplate` that already exists.

    Raises:
        ConfigError, DataError: as `tag_chat`.
    """
    if granularity not in GRANULARITIES:
        raise ConfigError(f"Unknown granularity {granularity!r}.", f"It is one of {', '.join(GRANULARITIES)}.")
    if split is not None and granularity != "sentence":
        raise ConfigError(
            f'A split is not used at granularity "{granularity}".', "", 'Leave it out, or use granularity "sentence".'
        )
    text = template.render(messages, generation_prompt)
    if granularity == "token":
        ids = tokenizer(text, **RENDERED)["input_ids"]
        return TaggedChat(text, ids, [SegmentTag.LAST] * len(ids))
    if not tokenizer.is_fast:
        raise DataError(
            f"The tokenizer {template.name} does not give the positions of tokens in the text.",
            f"{type(tokenizer).__name__} is a slow tokenizer.",
            f"Use a fast tokenizer. {WITHOUT_TAGS}",
        )
    if granularity == "sentence" and split is None:
        split = english
    spans = spans_of(template, messages, text, generation_prompt, split)
    encoded = tokenizer(text, return_offsets_mapping=True, **RENDERED)
    return TaggedChat(text, encoded["input_ids"], tags_of(text, encoded["offset_mapping"], spans))


def pad_token(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> int:
    """Return the token to pad `rows` with: the padding token, or else the end token.

    Raises:
        DataError: rows differ in length, and the tokenizer has neither.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None and len({len(row) for row in rows}) > 1:
        raise DataError(
            "The tokenizer has no token to pad with.",
            "It has neither a padding token nor an end token.",
            "Set tokenizer.pad_token, or encode the conversations one by one.",
        )
    return pad if pad is not None else 0


def pad_rows(rows: Sequence[Sequence[int]], fill: int, side: str = "right", dtype: torch.dtype = torch.int64) -> Tensor:
    """Pad rows of any lengths with `fill` on one side, and return them as one tensor `[B, T]`."""
    width = max(len(row) for row in rows)
    blanks = [[fill] * (width - len(row)) for row in rows]
    if side == "left":
        return torch.tensor([[*blank, *row] for blank, row in zip(blanks, rows, strict=True)], dtype=dtype)
    return torch.tensor([[*row, *blank] for blank, row in zip(blanks, rows, strict=True)], dtype=dtype)
