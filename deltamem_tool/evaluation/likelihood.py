"""How likely an answer is under a condition: the log-probability of each of its tokens after the prompt.

An answer's own tokens are those that hold a character of it. What the template writes before it (header, an empty
thought) is given, and what it writes after it (the end of the turn) is not scored: it says nothing about the content,
and it would count for more the shorter an answer is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.answer import cache_of, under
from deltamem_tool.evaluation.conditions import Condition
from deltamem_tool.evaluation.scoring.scales import LOG_PROB, TOKENS
from deltamem_tool.evaluation.task import Item
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.segments.encode import pad_token, padded
from deltamem_tool.segments.template import ChatTemplate

LOGITS = 2**28  # values at once, 1 GiB of float32: answers that have more are scored in parts of the batch


@dataclass(frozen=True)
class Scored:
    """Token ids of a prompt and an answer, and how many of them, the last ones, are the answer's."""

    ids: list[int]
    answer: int
    where: str


def scored_answers(
    tokenizer: PreTrainedTokenizerBase,
    items: Mapping[tuple[str, str], Item],
    prompts: Mapping[tuple[str, str], str],
    positions: int | None,
) -> dict[tuple[str, str], Scored]:
    """Each item's first answer after its prompt, by view and item, as the keys of `items` and `prompts` are.

    Args:
        tokenizer: a fast one with a chat template.
        positions: how many the model has; None if it has no limit.

    Raises:
        DataError: an answer is too long for the model with its prompt, has no token, has other tokens in one view than
            in another, or the template writes it nowhere; the item is named. Or the tokenizer is a slow one.
    """
    template = ChatTemplate.of(tokenizer)
    if not tokenizer.is_fast:
        raise DataError(
            f"The tokenizer {template.name} cannot tell where in a text its tokens are.",
            f"{type(tokenizer).__name__} is a slow tokenizer.",
            "Use a fast tokenizer.",
        )
    written: dict[str, tuple[str, str]] = {}
    found: dict[tuple[str, str], Scored] = {}
    tokens: dict[str, list[int]] = {}
    for (view, name), item in items.items():
        if name not in written:
            written[name] = _as_written(template, item)
        before, answer = written[name]
        found[view, name] = scored = _encoded(tokenizer, prompts[view, name] + before, answer, item.where)
        _refuse_long(scored, positions)
        own = scored.ids[-scored.answer :]
        if tokens.setdefault(name, own) != own:
            raise DataError(
                f"{item.where}: the answer has other tokens in one view than in another.",
                f"It begins with {tokens[name][:8]} and with {own[:8]}.",
                "Use a tokenizer whose template writes an answer the same way after any history.",
            )
    return found


def _as_written(template: ChatTemplate, item: Item) -> tuple[str, str]:
    """What the template writes between the prompt and the answer's content, and that content."""
    messages = [*item.question, {"role": "assistant", "content": item.answers[0]}]
    prompt = template.render(item.question, generation_prompt=True)
    text = template.render(messages)
    place = template.content(messages, len(messages) - 1, text)
    if place is None or not place.before.startswith(prompt) or not text.endswith(place.after):
        raise DataError(
            f"{item.where}: the chat template renders the prompt differently once the answer follows.",
            f"Prompt: {prompt[-80:]!r}; with the answer: {text[-80:]!r}.",
            "Use a tokenizer whose template only appends.",
        )
    return place.before[len(prompt) :], text[len(place.before) : len(text) - len(place.after)]


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, where: str) -> Scored:
    encoded = tokenizer(prompt + answer, add_special_tokens=False, return_offsets_mapping=True)
    own = sum(end > max(start, len(prompt)) for start, end in encoded["offset_mapping"])
    ids = encoded["input_ids"]
    if own == 0 or own == len(ids):
        raise DataError(
            f"{where} has no answer that could be scored.",
            "It has no token of its own." if own == 0 else "Nothing precedes it.",
            "Correct it, or leave it out.",
        )
    return Scored(ids, own, where)


def _refuse_long(scored: Scored, positions: int | None) -> None:
    if positions is not None and len(scored.ids) > positions:
        raise DataError(
            f"{scored.where} is too long for the model: {len(scored.ids)} tokens in view with the answer.",
            f"It has {positions} positions.",
            "Leave this condition out (--conditions), or use a model with more positions.",
        )


@torch.no_grad()
def log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Scored],
    memory: MemoryState | None,
    condition: Condition,
) -> list[list[float]]:
    """Of every row, the natural logarithm of the probability of each token of the answer.

    Args:
        memory: as in `ask`: what the prompt and the answer read. Neither writes.

    Raises:
        DataError: a logarithm is not finite; the item is named.
    """
    found: list[list[float]] = []
    with under(model, condition):
        for some in _parts(model, rows):
            part = None if memory is None else memory.select(list(some))
            cache = cache_of(model, part, condition, len(some))
            found += _log_probs(model, tokenizer, [rows[row] for row in some], cache)
    for row, values in zip(rows, found, strict=True):
        if not all(map(torch.isfinite, torch.tensor(values))):
            raise DataError(
                f"{row.where}: the log-probability of the answer is not finite.", "The model gives NaN or infinity.", ""
            )
    return found


def mean_log_prob(values: Sequence[float]) -> dict[str, float]:
    """Scores of an answer from the log-probabilities of its tokens."""
    return {LOG_PROB: sum(values) / len(values), TOKENS: float(len(values))}


def _parts(model: PreTrainedModel, rows: Sequence[Scored]) -> Iterator[range]:
    """Rows of which all logits that are wanted fit into LOGITS."""
    columns = max(len(row.ids) for row in rows) - min(len(row.ids) - row.answer for row in rows)
    size = max(1, LOGITS // (columns * model.config.get_text_config().vocab_size))
    for start in range(0, len(rows), size):
        yield range(start, min(start + size, len(rows)))


def _log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Scored], cache: MemoryCache | None
) -> list[list[float]]:
    ids = [row.ids for row in rows]
    tokens = padded(ids, pad_token(tokenizer, ids)).to(model.device)  # [B, T], padded on the right: positions from 0
    mask = padded([[1] * len(row) for row in ids], 0).to(model.device)
    first = min(len(row.ids) - row.answer for row in rows) - 1  # the first column whose logits are wanted
    likely = _logits(model, tokens, mask, first, cache)[:, :-1].float().log_softmax(-1)
    values = likely.gather(2, tokens[:, first + 1 :, None])[..., 0]  # [B, T - first - 1]
    ends = [len(row.ids) - first - 1 for row in rows]
    return [values[n, end - row.answer : end].tolist() for n, (row, end) in enumerate(zip(rows, ends, strict=True))]


def _logits(model: Any, tokens: Tensor, mask: Tensor, first: int, cache: MemoryCache | None) -> Tensor:
    """From column `first` on, `[B, T - first, V]`; where the model can, no others are computed."""
    given: dict[str, Any] = {"use_cache": False} if cache is None else {"cache": cache, "use_cache": True}
    length = tokens.shape[1]
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = length - first
    logits = model(input_ids=tokens, attention_mask=mask, **given).logits
    return logits[:, logits.shape[1] - (length - first) :]
