"""The task of `mqar.py`: pairs for one layer, its training on them, and what the delta rule predicts of its recall.

`docs/capacity.md` says what the layer is given and what is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.memory.layer import DeltaMemLayer
from deltamem_tool.ops.gates import gates, normalise, per_head, write_inputs
from deltamem_tool.ops.scan import delta_scan, read_state

WIDTH = 128  # the shipped backbone's hidden size
HALF = WIDTH // 2  # a token's own embedding, and that of the one before it
WORDS = 384  # keys, and as many values: the shipped vocabulary has 767 tokens
PAIRS = (1, 2, 4, 8, 16, 32, 64)

WARM_UP, BATCH, LEARNING_RATE, BETAS = 20, 32, 4e-3, (0.9, 0.98)
QUESTIONS, FEWEST = 512, 32  # asked of a trained layer: at least so many, in at least so many sequences
WATCHED = 16  # pairs of the curves along training and along the sequence
WATCH_EVERY, POSITION_SEQUENCES = 20, 256
GATES = tuple(2.0**-n for n in range(8))  # β that the prediction chooses from, beside the one before training
CONFIDENCE = 1.96  # standard errors, for 95 %


@dataclass(frozen=True)
class Words:
    """Embeddings of keys and values, drawn at random, `[WORDS, HALF]` each."""

    keys: Tensor
    values: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator) -> Words:
        return cls(*torch.randn(2, WORDS, HALF, generator=generator))


@dataclass(frozen=True)
class Sequences:
    """Pairs to write, and the questions about all of them.

    A hidden state has the token's own embedding and beside it that of the token before, as an attention head that looks
    back by one leaves them.

    Args:
        written: hidden states of the values' tokens, `[B, N, WIDTH]`.
        asked: those of the keys' tokens when they come again, with nothing before them.
        values: the right answers, `[B, N]`.
    """

    written: Tensor
    asked: Tensor
    values: Tensor

    @classmethod
    def draw(cls, words: Words, count: int, pairs: int, generator: torch.Generator) -> Sequences:
        keys = torch.rand(count, WORDS, generator=generator).argsort(dim=1)[:, :pairs]  # no key twice
        values = torch.randint(WORDS, (count, pairs), generator=generator)
        key, value = words.keys[keys], words.values[values]
        return cls(torch.cat([value, key], -1), torch.cat([key, torch.zeros_like(key)], -1), values)


Recall = Callable[[Sequences], Tensor]  # logits over the values, [B, N, WORDS]


def new_layer(config: DeltaMemConfig) -> DeltaMemLayer:
    """Its only correction is that of o, which is taken for an embedding of the value."""
    return DeltaMemLayer(config, WIDTH, {"o": HALF})


def recall(layer: DeltaMemLayer, words: Words, sequences: Sequences) -> Tensor:
    """Write all pairs, then ask for each: logits over the values."""
    empty = torch.zeros(len(sequences.values), *layer.config.state_shape)
    state = layer(sequences.written, empty, None, True).state
    return _logits(layer, words, layer(sequences.asked, state, None, False).readings)


def recall_random_keys(layer: DeltaMemLayer, words: Words, generator: torch.Generator, sequences: Sequences) -> Tensor:
    """The same with each pair's key and query turned together at random, in every state by itself.

    Their product stays, and what different pairs' are to each other is chance.
    """
    raw = [layer.value, layer.gate] + ([] if layer.decay is None else [layer.decay])
    v, *written = write_inputs(layer.config, [project(sequences.written) for project in raw])
    k = normalise(per_head(layer.key(sequences.written), layer.config))
    q = normalise(per_head(layer.query(sequences.asked), layer.config))
    product = (k * q).sum(-1, keepdim=True).clamp(-1, 1)
    turned = F.normalize(torch.randn(k.shape, generator=generator), dim=-1)
    other = torch.randn(k.shape, generator=generator)
    across = F.normalize(other - (other * turned).sum(-1, keepdim=True) * turned, dim=-1)
    asked_for = product * turned + (1 - product.square()).sqrt() * across
    return _logits(layer, words, written_and_read(turned, v, *written, asked_for).flatten(2))


def _logits(layer: DeltaMemLayer, words: Words, readings: Tensor) -> Tensor:
    return layer.correction("o", layer.scaled(readings)) @ words.values.mT


def written_and_read(k: Tensor, v: Tensor, log_keep: Tensor, erase: Tensor, write: Tensor, q: Tensor) -> Tensor:
    """What the queries read once all is written, `[B, N, H, R]`."""
    batch, _, heads, rank = k.shape
    _, state = delta_scan(q, k, v, log_keep, erase, write, k.new_zeros(batch, heads, rank, rank))
    return read_state(state, q)


def predict(config: DeltaMemConfig, count: int, pairs: int, generator: torch.Generator) -> dict[float, float]:
    """What the rule itself recalls with nothing learned, by the one β of all tokens.

    Keys are drawn from the unit sphere, for every state by itself, and a value's code from that of all states together;
    the answer is the code that what is read is most like.
    """
    heads, rank, _ = config.state_shape
    codes = F.normalize(torch.randn(WORDS, heads * rank, generator=generator), dim=-1)
    k = F.normalize(torch.randn(count, pairs, heads, rank, generator=generator), dim=-1)
    values = torch.randint(WORDS, (count, pairs), generator=generator)
    v = codes[values].view(k.shape)
    recalls = {}
    for beta in (first_gate(config), *GATES):
        opened = torch.logit(torch.full_like(v, beta), eps=1e-6)
        readings = written_and_read(k, v, *gates(config, opened, logarithm=True), k)
        recalls[beta] = _accuracy(readings.flatten(2) @ codes.mT, values).mean().item()
    return recalls


def first_gate(config: DeltaMemConfig) -> float:
    """β before training."""
    return 1 / (1 + math.exp(-config.beta_bias))


def _accuracy(logits: Tensor, values: Tensor) -> Tensor:
    return (logits.argmax(-1) == values).float()


def train(config: DeltaMemConfig, seed: int, steps: int, watch: bool) -> tuple[DeltaMemLayer, Words, list[list[float]]]:
    """Train all parameters of a layer on sequences of 1 to 64 pairs; return it, its words, and its recall meanwhile."""
    generator = torch.Generator().manual_seed(seed)
    words = Words.draw(generator)
    torch.manual_seed(seed)
    layer = new_layer(config)
    optimizer = torch.optim.AdamW(layer.parameters(), LEARNING_RATE, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_learning_rate, steps))
    curve = []
    for step in range(steps):
        pairs = PAIRS[int(torch.randint(len(PAIRS), (), generator=generator))]
        sequences = Sequences.draw(words, BATCH, pairs, generator)
        loss = F.cross_entropy(recall(layer, words, sequences).flatten(0, 1), sequences.values.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if watch and (step + 1) % WATCH_EVERY == 0:
            same = torch.Generator().manual_seed(seed + 1)  # the same sequences at every look
            mean, _ = asked(partial(recall, layer, words), words, WATCHED, same)
            curve.append([step + 1, mean])
    return layer, words, curve


def _learning_rate(steps: int, step: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def asked(ask: Recall, words: Words, pairs: int, generator: torch.Generator) -> tuple[float, float]:
    """Mean recall, and half of its interval at 95 %; a sequence counts as one, since its questions share a state."""
    sequences = Sequences.draw(words, max(FEWEST, QUESTIONS // pairs), pairs, generator)
    of_each = _accuracy(ask(sequences), sequences.values).mean(1)
    return of_each.mean().item(), CONFIDENCE * of_each.std().item() / math.sqrt(len(of_each))


@torch.no_grad()
def by_position(ask: Recall, words: Words, generator: torch.Generator) -> list[float]:
    """Recall of each of `WATCHED` pairs, the first written first."""
    sequences = Sequences.draw(words, POSITION_SEQUENCES, WATCHED, generator)
    return _accuracy(ask(sequences), sequences.values).mean(0).tolist()


@torch.no_grad()
def overlap(layer: DeltaMemLayer, words: Words) -> float:
    """Mean squared product of two different keys, which is 1/R at random."""
    written = torch.cat([torch.zeros_like(words.keys), words.keys], -1)  # after no value
    k = normalise(per_head(layer.key(written), layer.config))
    products = torch.einsum("nhr,mhr->hnm", k, k).square()
    return (products.sum() - WORDS * len(products)).item() / (len(products) * WORDS * (WORDS - 1))


@torch.no_grad()
def mean_gate(layer: DeltaMemLayer, words: Words) -> float:
    """Mean β of a pair."""
    return torch.sigmoid(layer.gate(torch.cat([words.values, words.keys], -1))).mean().item()
