"""Masks of a call: which tokens read, which write, and which end a segment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from deltamem_tool._compat import FakeTensor
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.segments.tags import SegmentTag

# Plain numbers: in a compiled graph a tensor does not compare with a member of an IntEnum as it does in eager mode.
OUTSIDE, LAST = int(SegmentTag.OUTSIDE), int(SegmentTag.LAST)


def valid_tokens(mask: Any, batch: int, length: int, past: int | Tensor) -> Tensor | None:
    """Return which of this call's tokens are not padding, bool `[B, T]`, from the 2-D attention mask `[B, P + T]`.

    Raises:
        MemoryStateError: the mask has another rank or another length.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise MemoryStateError(
            "The memory cannot tell padding from text.",
            "The attention mask is not a 2-D mask over past and new tokens.",
            "Pass attention_mask as [batch, past + new].",
        )
    # While a graph is traced, a static cache's count has no value; while one is exported, sizes are symbols that must
    # not be compared.
    unknown = torch.compiler.is_exporting() or (torch.compiler.is_compiling() and isinstance(past, Tensor))
    if not unknown and mask.shape != (batch, past + length):
        past = int(past)
        raise MemoryStateError(
            f"The attention mask is {list(mask.shape)}, not {[batch, past + length]}.",
            f"The cache has {past} tokens and the call {length}: columns of the mask would match the wrong tokens.",
            "Pass attention_mask as [batch, past + new], or None if there is no padding.",
        )
    return mask[:, -length:].bool()


def writing_tokens(write: bool | Tensor, read_mask: Tensor | None, content: Tensor) -> Tensor | bool:
    """Return which of this call's tokens write, bool `[B, T]`; True for all, False for none.

    Raises:
        MemoryStateError: the mask `write` does not have the tokens' shape, `[B, T]`.
    """
    if isinstance(write, Tensor):
        if write.shape != content.shape[:2]:
            raise MemoryStateError(
                f"The write mask has shape {list(write.shape)}, but the tokens have {list(content.shape[:2])}.",
                "",
                "Give cache.write the shape [batch, tokens].",
            )
        return write.bool() if read_mask is None else write.bool() & read_mask
    return read_mask if write and read_mask is not None else bool(write)


def segment_tokens(
    config: DeltaMemConfig, tags: Tensor | None, content: Tensor, read_mask: Tensor | None, write_mask: Tensor | bool
) -> tuple[Tensor | bool, Tensor | None]:
    """Return which of this call's tokens belong to a segment and which end one, bool `[B, T]` each.

    If every token writes, or if there are no tags, they are `write_mask` and None.

    Raises:
        MemoryStateError: every token writes but there are tags; or the tags are not a tensor `[B, T]` of `SegmentTag`s.
    """
    if config.granularity == "token":
        if tags is not None:
            raise MemoryStateError(
                "This memory has no segments.",
                "Its adapter writes at every token.",
                "Do not set cache.segment_tags.",
            )
        return write_mask, None
    batch, length = content.shape[:2]
    if tags is None:  # the open segment goes on
        return write_mask, None
    if not isinstance(tags, Tensor):
        raise MemoryStateError(
            f"cache.segment_tags is a {type(tags).__name__}.",
            "It must be an int8 tensor.",
            "Pass the tags that encode_chat returns.",
        )
    if tags.ndim != 2 or tags.shape[0] != batch or tags.shape[1] < length:
        raise MemoryStateError(
            f"cache.segment_tags has shape {list(tags.shape)}, but the tokens have {[batch, length]}.",
            "It needs one tag for every token of the call.",
            "Pass all the tags that encode_chat returns for these tokens.",
        )
    tags = tags[:, :length].to(content.device)
    if not torch.compiler.is_compiling() and not isinstance(tags, FakeTensor):
        if bool(((tags < OUTSIDE) | (tags > LAST)).any()):
            raise MemoryStateError(
                "cache.segment_tags contains values that are not segment tags.",
                "The tag of a token is 0 (outside any segment), 1 (inside) or 2 (the last of its segment).",
                "Pass the tags that encode_chat returns for these tokens.",
            )
        if read_mask is not None and bool(((tags != OUTSIDE) & ~read_mask).any()):
            raise MemoryStateError(
                "cache.segment_tags puts padding into a segment.",
                "It and the attention mask do not describe the same tokens.",
                "Pass both as encode_chat returns them.",
            )
    if write_mask is False:
        return False, None
    return write_mask & (tags != OUTSIDE), write_mask & (tags == LAST)


def replace_unknown_padding(tokens: Tensor, valid: Tensor, vocabulary: int) -> Tensor:
    """Give padding whose id the embedding does not have, as of a tokenizer with tokens added, an id that it has.

    Not at single tokens on a GPU, where it would cost time at each, and only ended rows are padded.

    Args:
        tokens: ids `[B, T]`.
        valid: bool `[B, T]`, tokens that are not padding.
        vocabulary: rows of the embedding.
    """
    if tokens.shape[1] == 1 and tokens.device.type != "cpu":
        return tokens
    return tokens.masked_fill((tokens >= vocabulary) & ~valid, 0)


def check_one_text(kwargs: Mapping[str, Any], valid: Tensor | None, base_separates: bool) -> None:
    """Check that no row of a call is packed with several texts: the later would read what the earlier have written.

    Args:
        kwargs: arguments of the decoder. If there are several positions, they are checked, which on a GPU waits for it
            once.
        valid: bool `[B, T]`, tokens that are not padding; None for all.
        base_separates: whether transformers treats any gap in the positions as the beginning of a text, as it does
            without a mask and a cache.

    Raises:
        MemoryStateError: positions start again within a row, or the arguments say where texts begin.
    """
    bounds, index, positions = (kwargs.get(name) for name in ("cu_seq_lens_q", "seq_idx", "position_ids"))
    packed = isinstance(bounds, Tensor) and bounds.numel() > 2  # 0 and the length of the one text
    if _has_numbers(index):
        packed = packed or bool((index != index[..., :1]).any())
    if _has_numbers(positions) and positions.ndim == 2 and positions.shape[1] > 1:  # else of time, height and width
        steps = positions.diff(dim=1)
        begins = steps != 1 if base_separates else steps < 1
        if valid is not None:
            begins = begins & valid[:, 1:] & valid[:, :-1]
        packed = packed or bool(begins.any())
    if packed:
        raise MemoryStateError(
            "A memory does not support rows that are packed with several texts.",
            "A row has one memory, so each text would read what the texts before it have written.",
            "Put each text into a row of its own, with padding and an attention mask.",
        )


def _has_numbers(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def check_writes_tokens(config: DeltaMemConfig) -> None:
    """Check that a call needs no cache: without one, a memory that writes by segments would not be written.

    Raises:
        MemoryStateError: the memory writes by messages or sentences.
    """
    if config.granularity != "token":
        raise MemoryStateError(
            f"This memory writes by {config.granularity}, but the call does not say where a {config.granularity} ends.",
            "Segment tags are an attribute of a MemoryCache, and the call has no MemoryCache.",
            "Pass cache=deltamem.MemoryCache(model), with its segment_tags set: see deltamem.encode_chat.",
        )
