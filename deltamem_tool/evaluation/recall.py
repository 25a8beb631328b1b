"""The `recall` task: facts are told, one is asked for, and only the memory has seen them.

Scored is the first question of a conversation, by exact match of the whole answer. Every fact is a held-out pair
(`dialogues.py`), so no answer was trained. Beside the state alone stand its controls, on the same questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool import dialogues
from deltamem_tool.adapter_module import DeltaMemAdapter
from deltamem_tool.chat_template import render
from deltamem_tool.dialogues import Message
from deltamem_tool.errors import DataError
from deltamem_tool.evaluation import FACTS
from deltamem_tool.segments import encode_chat
from deltamem_tool.state import MemoryCache, MemoryState
from deltamem_tool.surgery import adapter_of, detach, hook

CONDITIONS = {
    "state_only": "the memory after the conversation, and the question",
    "zero_state": "the same with the memory set to zeros",
    "donor_state": "the same with the memory of another conversation",
    "scale_zero": "the right memory, with the corrections scaled to zero",
    "no_memory": "the base model without adapter, and the question",
    "full_context": "the base model without adapter, the whole conversation in view",
}
MAX_NEW_TOKENS = 24
RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True)
class RecallEpisode:
    history: list[Message]
    question: Message
    answer: str


@dataclass(frozen=True)
class Score:
    """Share of exact matches and its bootstrap 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class RecallResult:
    facts: list[int]
    episodes: int  # for each number of facts
    seed: int
    scores: dict[str, list[Score]]  # by condition, in the order of `facts`


def recall_episodes(facts: int, count: int, seed: int) -> list[RecallEpisode]:
    """`count` conversations that tell `facts` held-out facts, and a question about one of them."""
    rng = random.Random(f"recall/{seed}/{facts}")
    episodes = []
    for _ in range(count):
        chosen = dialogues.sample_facts(rng, facts, held_out=True)
        asked = rng.choice(chosen)
        history = dialogues.telling(rng, chosen, held_out=True)
        episodes.append(RecallEpisode(history, dialogues.user(asked.question(rng)), asked.answer))
    return episodes


def evaluate_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[int] = FACTS,
    episodes: int = 200,
    seed: int = 0,
    batch_size: int = 100,
    conditions: Sequence[str] = tuple(CONDITIONS),
    report: Callable[[int, int], None] | None = None,
) -> RecallResult:
    """Exact match by number of facts and condition for a patched `model`; `report(done, of)` follows the work."""
    done, work = 0, len(facts) * len(conditions)
    scores: dict[str, list[Score]] = {condition: [] for condition in conditions}
    for count in facts:
        told = recall_episodes(count, episodes, seed)
        memory = memorise(model, tokenizer, told, batch_size)
        for condition in conditions:
            answers = answer(model, tokenizer, told, memory, condition, batch_size)
            right = np.array([said == episode.answer for said, episode in zip(answers, told, strict=True)])
            scores[condition].append(bootstrap(right, seed))
            done += 1
            if report is not None:
                report(done, work)
    return RecallResult(list(facts), episodes, seed, scores)


@torch.no_grad()
def memorise(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, episodes: Sequence[RecallEpisode], batch_size: int = 100
) -> MemoryState:
    """The memory after each episode's history, a row an episode."""
    granularity = adapter_of(model).config.granularity
    parts = []
    for start in range(0, len(episodes), batch_size):
        histories = [episode.history for episode in episodes[start : start + batch_size]]
        chat = encode_chat(tokenizer, histories, granularity)
        cache = MemoryCache(model)
        cache.segments = chat.segments
        ids, mask = chat.input_ids.to(model.device), chat.attention_mask.to(model.device)
        model.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        assert cache.memory is not None  # the call has made one
        parts.append(cache.memory)
    return MemoryState.stack(parts)


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    episodes: Sequence[RecallEpisode],
    memory: MemoryState,
    condition: str,
    batch_size: int = 100,
) -> list[str]:
    """Greedy answers to the episodes' questions under one of `CONDITIONS`; `memory` has a row an episode."""
    if condition == "donor_state" and len(episodes) < 2:
        raise DataError("One conversation has no other to take a memory from.", "", "Use two episodes or more.")
    adapter = adapter_of(model)
    said: list[str] = []
    for start in range(0, len(episodes), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(episodes)))
        some = [episodes[row] for row in rows]
        shown = [
            [*episode.history, episode.question] if condition == "full_context" else [episode.question]
            for episode in some
        ]
        batch = _left_padded(
            model, tokenizer, [render(tokenizer, messages, generation_prompt=True) for messages in shown]
        )
        if condition in ("no_memory", "full_context"):
            with _without_adapter(model):
                output = _generate(model, tokenizer, batch)
        elif condition == "zero_state":
            output = _generate(model, tokenizer, batch, adapter.empty_memory(len(some)))
        elif condition == "donor_state":
            donors = (rows + 1) % len(episodes)
            output = _generate(model, tokenizer, batch, memory.select(donors))
        elif condition == "scale_zero":
            with _corrections_off(adapter):
                mine = memory.select(rows)
                bound = MemoryState(mine.layers, adapter.fingerprint, mine.segments)  # Δ = 0 is another adapter
                output = _generate(model, tokenizer, batch, bound)
        elif condition == "state_only":
            output = _generate(model, tokenizer, batch, memory.select(rows))
        else:
            raise ValueError(f"condition must be one of {', '.join(CONDITIONS)}, not {condition!r}")
        said += [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
    return said


def bootstrap(right: np.ndarray, seed: int = 0) -> Score:
    """Mean of 0/1 outcomes with the percentile bootstrap's 95 % interval."""
    rng = np.random.default_rng(seed)
    means = rng.choice(right, (RESAMPLES, len(right))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Score(float(right.mean()), float(low), float(high))


def _left_padded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Tensor]:
    batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
    return {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}


def _generate(model: PreTrainedModel, tokenizer, batch: dict[str, Tensor], memory: MemoryState | None = None) -> Tensor:
    """Greedy continuation `[B, new]`. With `memory`, the question reads it and does not write."""
    cache = {} if memory is None else {"past_key_values": MemoryCache(model, memory, write=False)}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = cast(Any, model).generate(
        **batch, **cache, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=pad
    )
    return output[:, batch["input_ids"].shape[1] :]


@contextmanager
def _without_adapter(model: PreTrainedModel) -> Iterator[None]:
    adapter = adapter_of(model)
    detach(model)
    try:
        yield
    finally:
        hook(model, adapter)


@contextmanager
def _corrections_off(adapter: DeltaMemAdapter) -> Iterator[None]:
    """α = 0: every Δ is zero inside the block."""
    heads, layers = adapter.config.heads, adapter.layer_indices
    deltas = [adapter.memory(layer).delta_of(branch).weight for layer in layers for branch in heads]
    kept = [weight.clone() for weight in deltas]
    try:
        for weight in deltas:
            weight.zero_()
        yield
    finally:
        for weight, value in zip(deltas, kept, strict=True):
            weight.copy_(value)
