"""Does ONNX Runtime answer as PyTorch does? The recall task's questions through an ONNX folder, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from deltamem_tool.evaluation import BATCH_SIZE
from deltamem_tool.evaluation.task import Item
from deltamem_tool.onnx.runtime.engine import OnnxModel
from deltamem_tool.segments.encode import pad_token, padded
from deltamem_tool.segments.template import render


def answer_onnx(
    model: OnnxModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """Greedy answers from the state alone: the history's one session is written, then the question is asked in an empty
    context, where it reads and does not write."""
    said: list[str] = []
    for start in range(0, len(items), batch_size):
        some = items[start : start + batch_size]
        ids, mask = _left_padded(tokenizer, [render(tokenizer, item.history[0]) for item in some])
        _, past = model.graph.step(ids, mask, np.ones(ids.shape, bool), model.graph.empty_past(len(some)))
        questions = [render(tokenizer, item.question, generation_prompt=True) for item in some]
        ids, mask = _left_padded(tokenizer, questions)
        past = model.graph.empty_past(len(some), model.graph.states(past))
        answers: list[list[int]] = [[] for _ in some]
        going = np.ones(len(some), bool)
        for _ in range(max_new_tokens):
            logits, past = model.graph.step(ids, mask, np.zeros(ids.shape, bool), past)
            ids = logits[:, -1].argmax(axis=-1)[:, None]
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
            going &= ~np.isin(ids[:, 0], list(model.stop_tokens))
            if not going.any():
                break
            for row in np.flatnonzero(going):
                answers[row].append(int(ids[row, 0]))
        said += [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
    return said


def _left_padded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[NDArray, NDArray]:
    """Token ids and mask, int64 `[B, T]`."""
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    mask = [[1] * len(row) for row in ids]
    return padded(ids, pad_token(tokenizer, ids), "left").numpy(), padded(mask, 0, "left").numpy()
