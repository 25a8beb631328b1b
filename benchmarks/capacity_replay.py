"""Predict recall with the delta rule: the writes of conversations are recorded and replayed."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from replay import Writes, nearest, read, retained
from torch import Tensor

from deltamem_tool.config import L2_EPS
from deltamem_tool.data import dialogues
from deltamem_tool.evaluation import BATCH_SIZE
from deltamem_tool.evaluation.subject import Subject
from deltamem_tool.evaluation.task import Item
from deltamem_tool.evaluation.write_pass import memorise
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.segments.encode import encode_chat, pad_rows
from deltamem_tool.segments.template import render

TELLINGS = 2  # one-fact conversations per prototype
_ANSWER = re.compile(r"(Your (\w+) is) (\w+)\.")
CLOSE = 1e-3  # allowed difference between a replay and the model's own states and readings


@dataclass(frozen=True)
class Recorded:
    """A batch of conversations: the writes of each layer, and masks of tokens, `[B, T]`."""

    writes: dict[int, Writes]
    fact: Tensor  # tokens of the turns that tell the requested fact
    later: Tensor  # tokens written after the last of these
    real: Tensor  # tokens that are not padding
    memory: MemoryState


class Prototypes:
    """The mean reading for each value, at the word before the value, after one fact was told."""

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        self._model, self._tokenizer, self._seed = model, tokenizer, seed
        self._known: dict[str, Tensor] = {}

    def of(self, attribute: str) -> Tensor:
        """Return the prototypes `[values, N]`, N = layers · H · R, in the order of the kind's values."""
        if attribute not in self._known:
            rng = random.Random(f"prototypes/{self._seed}/{attribute}")
            values = dialogues.KIND_OF[attribute].values
            facts = [dialogues.Fact(attribute, value) for value in values for _ in range(TELLINGS)]
            items = [_one_fact(rng, fact) for fact in facts]
            subject = Subject.from_model(self._model, self._tokenizer)
            memory = subject.engine.start(memorise(subject, [item.history for item in items])).memory
            _, readings = read_before_value(self._model, self._tokenizer, items, memory)
            self._known[attribute] = joined(readings).view(len(values), TELLINGS, -1).mean(1)
        return self._known[attribute]


def _one_fact(rng: random.Random, fact: dialogues.Fact) -> Item:
    told = dialogues.statement_exchange(rng, fact.statement(rng))
    return Item("", "", [told], [dialogues.user(fact.question(rng))], [fact.answer], "", fact.answer)


def predict(model: Any, tokenizer: Any, items: Sequence[Item], prototypes: Prototypes, seed: int) -> dict[str, Any]:
    """Return means over `items`: how often the value nearest to the reading is the right one or the old one, with the
    model's keys and with random or rotated ones; the share of the fact's reading that is left; and the later writes."""
    found: list[dict[str, Tensor]] = []
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for some in _alike(items):
            found.append(_predicted(model, tokenizer, some, prototypes, generator))
    means = {name: torch.cat([one[name].double() for one in found]).nanmean().item() for name in found[0]}
    return {name: None if math.isnan(mean) else mean for name, mean in means.items()}  # NaN: nothing was written since


def _alike(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Yield batches of histories with the same number of sessions."""
    for count in sorted({len(item.history) for item in items}):
        some = [item for item in items if len(item.history) == count]
        for start in range(0, len(some), BATCH_SIZE):
            yield some[start : start + BATCH_SIZE]


def _predicted(
    model: Any, tokenizer: Any, items: Sequence[Item], prototypes: Prototypes, generator: torch.Generator
) -> dict[str, Tensor]:
    recorded = record(model, tokenizer, items)
    queries, readings = read_before_value(model, tokenizer, items, recorded.memory)
    now, first, drawn, turned, left_turned, expected, gates, overlaps = {}, {}, {}, {}, {}, {}, [], []
    others = recorded.real & ~recorded.fact
    for layer, writes in recorded.writes.items():
        _check(writes.state(), recorded.memory.layers[layer])
        q, mine = queries[layer], writes.only(recorded.fact)
        _check(read(recorded.memory.layers[layer], q), readings[layer])
        now[layer] = read(mine.state(), q)
        first[layer] = read(mine.until(~recorded.later).state(), q)
        drawn[layer] = read(writes.with_random_keys(others, generator).state(), q)
        rotated = writes.with_rotated_keys(others, generator)
        turned[layer] = read(rotated.state(), q)
        left_turned[layer] = read(rotated.only(recorded.fact).state(), q)
        expected[layer] = writes.expected_share(recorded.later) * first[layer]
        written = recorded.later[:, :, None, None] & (writes.write > 0)
        gates.append((writes.erase * written).sum((1, 2, 3)) / written.sum((1, 2, 3)))
        along = torch.einsum("bthj,bhj->bth", writes.k, q).square() * written.any(-1)
        overlaps.append(along.sum((1, 2)) / written.any(-1).sum((1, 2)))
    matches = [_ANSWER.fullmatch(item.answers[0]) for item in items]
    of_attribute = [match[2] for match in matches if match]
    candidates = torch.stack([prototypes.of(attribute) for attribute in of_attribute])
    replayed = {"own keys": readings, "random keys": drawn, "rotated keys": turned}
    said = {name: nearest(joined(read_then), candidates) for name, read_then in replayed.items()}
    result = {}
    for name, choice in said.items():
        words = [dialogues.KIND_OF[a].values[int(c)] for a, c in zip(of_attribute, choice, strict=True)]
        answers = [dialogues.ANSWER.format(a=a, v=v) for a, v in zip(of_attribute, words, strict=True)]
        result[f"exact, {name}"] = torch.tensor([a == i.answers[0] for a, i in zip(answers, items, strict=True)])
        stale = [a == getattr(i, "stale", "") for a, i in zip(answers, items, strict=True)]
        result[f"old, {name}"] = torch.tensor(stale)
    return {
        **result,
        "left, own keys": retained(joined(now), joined(first)),
        "left, random keys": retained(joined(expected), joined(first)),
        "left, rotated keys": retained(joined(left_turned), joined(first)),
        "tokens since": recorded.later.sum(1),
        "gate": torch.stack(gates).mean(0),
        "overlap": torch.stack(overlaps).mean(0),
    }


def _check(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=CLOSE, rtol=CLOSE)


def joined(by_layer: dict[int, Tensor]) -> Tensor:
    """Concatenate `[B, H, R]` of all layers to `[B, N]`."""
    return torch.cat([by_layer[layer].flatten(1) for layer in sorted(by_layer)], dim=1)


def record(model: Any, tokenizer: Any, items: Sequence[Item]) -> Recorded:
    """Write histories with the same number of sessions as an evaluation does, and record the writes."""
    adapter = adapter_of(model)
    memory = adapter.empty_memory(len(items))
    writes: dict[int, Writes] = {}
    facts, real = [], []
    for number in range(len(items[0].history)):
        sessions = [item.history[number] for item in items]
        chat = encode_chat(tokenizer, sessions, adapter.config.granularity, padding_side="right")
        cache = MemoryCache(model, memory)
        cache.segment_tags = chat.segment_tags
        with _scans() as scanned:
            model.base_model(input_ids=chat.input_ids, attention_mask=chat.attention_mask, cache=cache)
        assert cache.memory is not None and len(scanned) == len(adapter.layer_indices)
        memory = cache.memory
        for layer, new in zip(adapter.layer_indices, scanned, strict=True):
            writes[layer] = writes[layer] + new if layer in writes else new
        real.append(chat.attention_mask.bool())
        facts.append(torch.stack([_told_at(tokenizer, item, number, chat.input_ids.shape[1]) for item in items]))
    fact, present = torch.cat(facts, 1), torch.cat(real, 1)
    seen = fact.flip(1).cumsum(1).flip(1) > 0  # a token of the fact follows
    return Recorded(writes, fact, present & ~seen, present, memory)


@contextmanager
def _scans() -> Iterator[list[Writes]]:
    """Record the arguments of every `delta_scan` in the block, layer by layer."""
    from deltamem_tool.memory import layer as memory

    found: list[Writes] = []
    own = memory.delta_scan

    def scan(q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, erase: Tensor, write: Tensor, state: Tensor) -> Any:
        found.append(Writes(k, v, log_keep, erase, write))
        return own(q, k, v, log_keep, erase, write, state)

    with patch.object(memory, "delta_scan", scan):
        yield found


def _told_at(tokenizer: Any, item: Item, number: int, length: int) -> Tensor:
    """Return the tokens of a session whose turns set the requested attribute, bool `[length]`."""
    match = _ANSWER.fullmatch(item.answers[0])
    assert match is not None, item.answers
    session, here = item.history[number], torch.zeros(length, dtype=torch.bool)
    for place, message in enumerate(session):
        if message["role"] == "user" and re.search(rf"\bmy {match[2]} is ", message["content"], re.IGNORECASE):
            start, end = (_count(tokenizer, session[:upto]) for upto in (place, place + 2))
            here[start:end] = True
    return here


def _count(tokenizer: Any, messages: Sequence[Any]) -> int:
    return len(tokenizer(render(tokenizer, list(messages)), add_special_tokens=False).input_ids) if messages else 0


def read_before_value(
    model: Any, tokenizer: Any, items: Sequence[Item], memory: MemoryState
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return queries and readings, `[B, H, R]` by layer, at the word before the value in the right answer."""
    texts = []
    for item in items:
        match = _ANSWER.fullmatch(item.answers[0])
        assert match is not None, item.answers
        texts.append(render(tokenizer, item.question, generation_prompt=True) + match[1])
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    mask = pad_rows([[1] * len(row) for row in ids], 0, "left")
    adapter = adapter_of(model)
    shape = (len(items), adapter.config.state_heads, adapter.config.rank)
    queries: dict[int, Tensor] = {}
    readings: dict[int, Tensor] = {}
    handles = []
    for layer in adapter.layer_indices:
        module = adapter.layer(layer)

        def keep_query(_: Any, __: Any, out: Tensor, layer: int = layer) -> None:
            raw = torch.tanh(out[:, -1]).view(shape)
            queries[layer] = raw / torch.linalg.vector_norm(raw, dim=-1, keepdim=True).clamp_min(L2_EPS)

        def keep_reading(_: Any, __: Any, out: Any, layer: int = layer) -> None:
            readings[layer] = out[0][:, -1].view(shape)

        handles += [module.query.register_forward_hook(keep_query), module.register_forward_hook(keep_reading)]
    try:
        with torch.no_grad():
            cache = MemoryCache(model, memory, write=False)
            model.base_model(input_ids=pad_rows(ids, 0, "left"), attention_mask=mask, cache=cache)
    finally:
        for handle in handles:
            handle.remove()
    return queries, readings
