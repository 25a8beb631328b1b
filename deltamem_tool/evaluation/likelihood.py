"""The likelihood of an answer under a condition: the log-probability of each of its tokens after the prompt.

The tokens of an answer are those that contain a character of it. Text that the template writes before the answer (a
header, an empty thought) belongs to the prompt. Text that it writes after the answer (the end of the turn) is not
scored: it says nothing about the content, and would weigh more the shorter an answer is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.conditions import Condition
from deltamem_tool.evaluation.memories import take_rows
from deltamem_tool.evaluation.scoring.scales import LOG_PROB, TOKENS
from deltamem_tool.evaluation.subject import Subject
from deltamem_tool.evaluation.task import Item
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.segments.encode import RENDERED, pad_rows
from deltamem_tool.segments.template import ChatTemplate

LOGITS = 2**28  # values at once, 1 GiB of float32: answers that have more are scored in parts of the batch


@dataclass(frozen=True)
class ScoredAnswer:
    """Token ids of a prompt with its answer, and the number of tokens at the end that belong to the answer."""

    ids: list[int]
    answer: int
    where: str


def scored_answers(
    subject: Subject, items: Mapping[tuple[str, str], Item], prompts: Mapping[tuple[str, str], str]
) -> dict[tuple[str, str], ScoredAnswer]:
    """Tokenise each item's first answer after its prompt, by view and item, like the keys of `items` and `prompts`.

    Raises:
        DataError: an answer with its prompt is too long for the model, has no token, is tokenised differently in two
            views, or is not written by the template; the message names the item. Or the tokenizer is not a fast one.
    """
    tokenizer = subject.tokenizer
    template = ChatTemplate.from_tokenizer(tokenizer)
    if not tokenizer.is_fast:
        raise DataError(
            f"The tokenizer {template.name} does not report where its tokens are in the text.",
            f"{type(tokenizer).__name__} is a slow tokenizer.",
            "Use a fast tokenizer.",
        )
    written: dict[str, tuple[str, str]] = {}
    answers: dict[tuple[str, str], ScoredAnswer] = {}
    tokens: dict[str, list[int]] = {}
    for (view, name), item in items.items():
        if name not in written:
            written[name] = _render_pair(template, item)
        before, answer = written[name]
        answers[view, name] = scored = _encode_answer(tokenizer, prompts[view, name] + before, answer, item.where)
        _check_length(scored, subject.positions)
        answer_ids = scored.ids[-scored.answer :]
        if tokens.setdefault(name, answer_ids) != answer_ids:
            raise DataError(
                f"{item.where}: the answer is tokenised differently in different views.",
                f"It begins with {tokens[name][:8]} in one view and with {answer_ids[:8]} in another.",
                "Use a tokenizer whose template writes an answer the same way after any history.",
            )
    return answers


def _render_pair(template: ChatTemplate, item: Item) -> tuple[str, str]:
    """Return the text that the template writes between the prompt and the answer's content, and that content."""
    messages = [*item.question, {"role": "assistant", "content": item.answers[0]}]
    try:
        template = template.with_kwargs(item.template_kwargs)
        _, answer = template.exchange(messages)
        text = template.render(messages)
    except DataError as error:
        raise DataError(f"{item.where}: {error.what}", error.why, error.next) from error
    place = template.content(messages, len(messages) - 1, text)
    content = "" if place is None else text[len(place.before) : len(text) - len(place.after)]
    if place is None or not answer.endswith(f"{content}{place.after}"):
        raise DataError(
            f"{item.where}: the chat template does not show where the answer's content is.",
            f"It writes {answer[:80]!r}.",
            "Use a tokenizer whose template writes an answer as it is.",
        )
    return answer.removesuffix(f"{content}{place.after}"), content


def _encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, where: str) -> ScoredAnswer:
    encoded = tokenizer(prompt + answer, return_offsets_mapping=True, **RENDERED)
    answer_tokens = sum(end > max(start, len(prompt)) for start, end in encoded["offset_mapping"])
    ids = encoded["input_ids"]
    if answer_tokens == 0 or answer_tokens == len(ids):
        raise DataError(
            f"{where} has no answer to score.",
            "The answer has no token of its own." if answer_tokens == 0 else "Nothing precedes the answer.",
            "Correct it, or leave it out.",
        )
    return ScoredAnswer(ids, answer_tokens, where)


def _check_length(scored: ScoredAnswer, positions: int | None) -> None:
    if positions is not None and len(scored.ids) > positions:
        raise DataError(
            f"{scored.where} is too long for the model: {len(scored.ids)} tokens in view with the answer.",
            f"It has {positions} positions.",
            "Leave this condition out (--conditions), or use a model with more positions.",
        )


def check_logits(subject: Subject) -> None:
    """Check with one token that the model gives the logits of every position, before histories are written for hours.

    Raises:
        ExportError: the graph has the logits of the last position only.
    """
    engine, ids = subject.engine, np.zeros((1, 1), np.int64)
    writes = np.zeros_like(ids, dtype=bool)
    ends = writes if engine.memory_shape.segment_width else None
    engine.step(engine.start(subject.memory_for(None, 1)), ids, np.ones_like(ids), writes, ends, all_positions=True)


def log_probs(
    subject: Subject, rows: Sequence[ScoredAnswer], memory: StoredMemory | None, condition: Condition
) -> list[list[float]]:
    """Return the natural logarithm of the probability of each token of the answers.

    Args:
        subject: the model.
        rows: prompts and answers.
        memory: a row for each of them, which prompt and answer read, and write if `subject` says so. None for zeros.
        condition: condition that the model is in.

    Raises:
        DataError: a logarithm is NaN or infinite; the message names the item.
        ExportError: the graph has the logits of the last position only.
    """
    values: list[list[float]] = []
    with subject.apply_condition(condition):
        for part in _parts(subject, rows):
            memories = subject.memory_for(None if memory is None else take_rows(memory, part), len(part))
            values += _log_probs(subject, [rows[row] for row in part], memories, subject.writes(condition))
    for row, logarithms in zip(rows, values, strict=True):
        if not all(map(math.isfinite, logarithms)):
            raise DataError(
                f"{row.where}: the log-probability of the answer is not finite.", "The model gives NaN or infinity.", ""
            )
    return values


def mean_log_prob(values: Sequence[float]) -> dict[str, float]:
    """Return the scores of an answer from the log-probabilities of its tokens."""
    return {LOG_PROB: sum(values) / len(values), TOKENS: float(len(values))}


def _parts(subject: Subject, rows: Sequence[ScoredAnswer]) -> Iterator[range]:
    """Yield ranges of rows whose logits fit into LOGITS values."""
    size = max(1, LOGITS // (_width(rows) * len(subject.tokenizer)))
    for start in range(0, len(rows), size):
        yield range(start, min(start + size, len(rows)))


def _width(rows: Sequence[ScoredAnswer]) -> int:
    """Return the number of last columns whose logits are computed: the longest answer and the token before it.

    It is all columns if a row would have no token in the columns before, because attention needs at least one.
    """
    last = max(row.answer for row in rows) + 1
    return last if min(len(row.ids) for row in rows) > last else max(len(row.ids) for row in rows)


def _log_probs(subject: Subject, rows: Sequence[ScoredAnswer], memory: StoredMemory, write: bool) -> list[list[float]]:
    engine = subject.engine
    ids = pad_rows([row.ids for row in rows], 0, "left").numpy()
    mask = pad_rows([[1] * len(row.ids) for row in rows], 0, "left").numpy()
    first, last = ids.shape[1] - _width(rows), ids.shape[1] - 1  # nothing follows the last token
    written = mask.astype(bool) & write
    past = engine.start(memory)
    for start, end in ((0, first), (first, last)) if first else ((0, last),):
        writes = written[:, start:end]
        ends = np.zeros_like(writes) if engine.memory_shape.segment_width else None
        logits, past = engine.step(past, ids[:, start:end], mask[:, :end], writes, ends, all_positions=end == last)
    likely = torch.from_numpy(logits).log_softmax(-1)  # [B, T - first - 1, V]
    values = likely.gather(2, torch.from_numpy(ids[:, first + 1 :, None]))[..., 0]
    return [values[number, -row.answer :].tolist() for number, row in enumerate(rows)]
