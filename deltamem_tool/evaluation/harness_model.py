"""A model with a memory for lm-evaluation-harness. Every request starts from zeros, whatever its batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool.base_model.limits import unknown_token
from deltamem_tool.base_model.placement import input_device
from deltamem_tool.chat.sampling import not_finite_error
from deltamem_tool.errors import DataError
from deltamem_tool.memory.attachment import find_attachment
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.decoder_call import is_memory_off
from deltamem_tool.segments.encode import tag_chat
from deltamem_tool.segments.tags import SegmentTag


class MemoryLM(HFLM):  # type: ignore[misc]  # lm_eval has no types
    """A model of lm-evaluation-harness with a memory.

    Requests are independent: the memory of a call starts from zeros, is written as tokens come, and is dropped.
    Requests that are too long are rejected, whereas the harness would truncate them from the left.

    Args:
        model: the model, with or without its adapter at the time of a request.
        tokenizer: the tokenizer; it is not changed.
        chat: whether prompts are rendered by the chat template, which then writes all special tokens.
        tell: called with the number of requests done, and their total.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        chat: bool,
        tell: Callable[[int, int], None],
    ) -> None:
        # Not the base tokenizer itself: the harness sets its padding.
        bos = False if chat else None
        super().__init__(model, "causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, add_bos_token=bos)
        self._device = input_device(model)
        self._vocabulary = cast(Any, model).get_input_embeddings().weight.shape[0]
        if self.tokenizer.pad_token_id >= self._vocabulary:
            self.tokenizer.pad_token_id = 0  # any token of the model, because a mask hides it
        attachment = find_attachment(model)
        self._granularity = "token" if attachment is None or is_memory_off() else attachment.adapter.config.granularity
        self._tags: dict[tuple[int, ...], list[int]] = {}  # segment tags of the rendered prompts, if segments write
        self._tell = tell
        self._done = self._of = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score continuations."""
        self._begin(requests)
        return cast(list[tuple[float, bool]], super().loglikelihood(requests, disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Score whole texts."""
        self._begin(requests)
        return cast(list[float], super().loglikelihood_rolling(requests, disable_tqdm))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answer prompts."""
        self._begin(requests)
        return cast(list[str], super().generate_until(requests, disable_tqdm))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat, and remember where its segments end."""
        text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        if self._granularity != "token":
            tagged = tag_chat(self.tokenizer, chat_history, self._granularity, add_generation_prompt)
            self._tags[tuple(tagged.input_ids)] = tagged.tags
        return text

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Tokenise prompts, and reject those that are too long."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is not None:
            self._refuse_long(ids.shape[1], left_truncate_len)
        return ids, mask

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **options: Any) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            self._refuse_long(len(context) + len(continuation) - 1, self.max_length)  # the last token is not fed
        return cast(list[tuple[float, bool]], super()._loglikelihood_tokens(requests, *args, **options))

    def _refuse_long(self, length: int, most: int) -> None:
        if length > most:
            raise DataError(
                f"A prompt is too long for the model: {length} tokens, where {most} fit.",
                f"The model has {self.max_length} positions, some of which are for the answer.",
                "Use a model with more positions, or fewer examples in the prompt (--set num_fewshot=0).",
            )

    def _begin(self, requests: list[Any]) -> None:
        self._done, self._of = 0, len(requests)

    def _count(self, rows: int) -> None:
        self._done += rows
        self._tell(min(self._done, self._of), self._of)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return logits `[B, T, V]`. Rows are padded on the right, where no later token can see the padding."""
        self._check_ids(inps)
        with torch.no_grad():
            cache_options = self._cache(inps, torch.ones_like(inps))
            logits: Tensor = self.model(inps, use_cache=bool(cache_options), **cache_options).logits
        _check_finite(logits)
        self._count(len(inps))
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        self._check_ids(context)
        cache_options = self._cache(context, options["attention_mask"])
        options["logits_processor"] = LogitsProcessorList([_FiniteScores()])
        output: Tensor = super()._model_generate(context, max_length, stop, **options, **cache_options)
        self._count(len(context))
        return output

    def _check_ids(self, ids: Tensor) -> None:
        largest = int(ids.max())
        if largest >= self._vocabulary:
            raise unknown_token(self.tokenizer.convert_ids_to_tokens(largest), largest, self._vocabulary)

    def _cache(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Return the argument for a cache with a memory of zeros and the segment tags.

        It is empty if every token writes or there is no memory, because a call without a cache starts from zeros.
        """
        if self._granularity == "token":
            return {}
        cache = MemoryCache(self.model)
        cache.segment_tags = torch.tensor(
            [self._segments(row, valid) for row, valid in zip(ids.tolist(), mask.tolist(), strict=True)],
            dtype=torch.int8,
            device=ids.device,
        )
        return {"cache": cache}

    def _segments(self, row: list[int], valid: list[int]) -> list[int]:
        """Return a tag for each token: those of the prompt it begins with, then those of the answer's segment."""
        padding = len(valid) - sum(valid)  # on the left
        tokens = tuple(row[padding:])
        for length in sorted({len(ids) for ids in self._tags}, reverse=True):
            tags = self._tags.get(tokens[:length])
            if tags is not None and len(tags) == length:
                return [SegmentTag.OUTSIDE] * padding + tags + [SegmentTag.INSIDE] * (len(tokens) - length)
        raise DataError(
            "A prompt has no messages that the memory could write.",
            f"The adapter writes {self._granularity} by {self._granularity}, and this is not a rendered conversation.",
            "Use an adapter that writes at every token, or a task that does not prefix the answer.",
        )


def _check_finite(logits: Tensor) -> None:
    """Check that logits `[…, V]` contain no NaN or infinity, and not only minus infinity."""
    if not bool(logits.amax(-1).isfinite().all()):
        raise not_finite_error("The model's logits")


class _FiniteScores(LogitsProcessor):
    """Check the scores of every step of `generate`, which would otherwise choose the first token or crash."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        _check_finite(scores)
        return scores
