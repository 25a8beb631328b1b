"""Which tokens of a call read, which write, and which end a segment; what cannot be so is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.ops.fake import is_fake
from deltamem_tool.segments.tags import INSIDE, LAST, OUTSIDE


def valid_tokens(mask: Any, batch: int, length: int, past: int | Tensor) -> Tensor | None:
    """Which of this call's tokens are no padding, bool `[B, T]`, from the 2-D attention mask `[B, P + T]`."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise MemoryStateError(
            "The memory cannot tell padding from text.",
            "The attention mask is not the 2-D mask over past and new tokens.",
            "Pass attention_mask as [batch, past + new].",
        )
    # While a graph is traced, a static cache's count has no value; while one is exported, sizes are symbols that must
    # not be compared.
    unknown = torch.compiler.is_exporting() or (torch.compiler.is_compiling() and isinstance(past, Tensor))
    if not unknown and mask.shape != (batch, past + length):
        past = int(past)
        raise MemoryStateError(
            f"The attention mask is {list(mask.shape)}, not {[batch, past + length]}.",
            f"The cache holds {past} tokens and the call brings {length}: attention would take columns for others.",
            "Pass attention_mask as [batch, past + new], or none where nothing is padding.",
        )
    return mask[:, -length:].bool()


def writing_tokens(write: bool | Tensor, reads: Tensor | None, content: Tensor) -> Tensor | bool:
    """Which of this call's tokens write, bool `[B, T]`; True for all, False for none."""
    if isinstance(write, Tensor):
        if write.shape != content.shape[:2]:
            raise MemoryStateError(
                f"The write mask is {list(write.shape)}, the tokens are {list(content.shape[:2])}.",
                "",
                "Make them equal.",
            )
        return write.bool() if reads is None else write.bool() & reads
    return reads if write and reads is not None else bool(write)


def segment_tokens(
    config: DeltaMemConfig, marks: Tensor | None, content: Tensor, reads: Tensor | None, writes: Tensor | bool
) -> tuple[Tensor | bool, Tensor | None]:
    """Which of this call's tokens belong to a segment and which end one, bool `[B, T]` each, from the marks of the
    tokens to come; where every token writes, `writes` and None."""
    if config.granularity == "token":
        if marks is not None:
            raise MemoryStateError(
                "This memory has no segments.", "Its adapter writes every token by itself.", "Leave cache.segments out."
            )
        return writes, None
    batch, length = content.shape[:2]
    if marks is None:  # the open segment goes on
        return writes, None
    if not isinstance(marks, Tensor):
        raise MemoryStateError(
            f"cache.segments is a {type(marks).__name__}.", "It must be an int8 tensor.", "Pass what encode_chat gave."
        )
    if marks.ndim != 2 or marks.shape[0] != batch or marks.shape[1] < length:
        raise MemoryStateError(
            f"cache.segments is {list(marks.shape)}, the tokens are {[batch, length]}.",
            "It must say of every token of the call to which segment it belongs.",
            "Pass what encode_chat gave for these tokens, and not less.",
        )
    marks = marks[:, :length].to(content.device)
    if not torch.compiler.is_compiling() and not is_fake(marks):
        if bool(((marks < OUTSIDE) | (marks > LAST)).any()):
            raise MemoryStateError(
                "cache.segments holds marks that there are not.",
                f"A token is {OUTSIDE} (outside), {INSIDE} (inside) or {LAST} (the last of its segment).",
                "Pass what encode_chat gave for these tokens.",
            )
        if reads is not None and bool(((marks != OUTSIDE) & ~reads).any()):
            raise MemoryStateError(
                "cache.segments puts padding into a segment.",
                "It and the attention mask are not of the same tokens.",
                "Pass both as encode_chat gave them.",
            )
    if writes is False:
        return False, None
    return writes & (marks != OUTSIDE), writes & (marks == LAST)


def refuse_without_segments(config: DeltaMemConfig) -> None:
    """Without a cache nobody can say, then or later, where a segment ends: nothing would ever be written."""
    if config.granularity != "token":
        raise MemoryStateError(
            f"This memory writes by {config.granularity}, and nothing says where one ends.",
            "Without a MemoryCache there is no place to say it.",
            "Pass cache=cache and set cache.segments: see deltamem.encode_chat.",
        )
