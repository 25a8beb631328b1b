"""The task of `mqar.py`: pairs for one layer, its training, and the recall that the delta rule predicts.

`docs/capacity.md` explains the task and the predictions.
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
HALF = WIDTH // 2  # one half for a token's own embedding, one for that of the token before
WORDS = 384  # number of keys, and of values; the shipped vocabulary has 767 tokens
PAIRS = (1, 2, 4, 8, 16, 32, 64)

WARM_UP, BATCH, LEARNING_RATE, BETAS = 20, 32, 4e-3, (0.9, 0.98)
QUESTIONS, FEWEST = 512, 32  # minimum number of questions to a trained layer, and of sequences
WATCHED = 16  # number of pairs in the curves over training and over the sequence
WATCH_EVERY, POSITION_SEQUENCES = 20, 256
GATES = tuple(2.0**-n for n in range(8))  # values of β for the prediction, besides that before training
CONFIDENCE = 1.96  # standard errors, for 95 %


@dataclass(frozen=True)
class Words:
    """Random embeddings of keys and values, `[WORDS, HALF]` each."""

    keys: Tensor
    values: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator) -> Words:
        return cls(*torch.randn(2, WORDS, HALF, generator=generator))


@dataclass(frozen=True)
class Sequences:
    """Pairs to write, and the questions about all of them.

    A hidden state has the token's own embedding and that of the token before, like the output of an attention head that
    looks back by one token.

    Args:
        written: hidden states of the values' tokens, `[B, N, WIDTH]`.
        asked: hidden states of the keys' tokens when they appear again, without a token before.
        values: the right answers, `[B, N]`.
    """

    written: Tensor
    asked: Tensor
    values: Tensor

    @classmethod
    def draw(cls, words: Words, count: int, pairs: int, generator: torch.Generator) -> Sequences:
        keys = torch.rand(count, WORDS, generator=generator).argsort(dim=1)[:, :pairs]  # without repeated keys
        values = torch.randint(WORDS, (count, pairs), generator=generator)
        key, value = words.keys[keys], words.values[values]
        return cls(torch.cat([value, key], -1), torch.cat([key, torch.zeros_like(key)], -1), values)


Recall = Callable[[Sequences], Tensor]  # logits over the values, [B, N, WORDS]


def new_layer(config: DeltaMemConfig) -> DeltaMemLayer:
    """Return a layer whose only correction is that of o, which is read as an embedding of the value."""
    return DeltaMemLayer(config, WIDTH, {"o": HALF})


def recall(layer: DeltaMemLayer, words: Words, sequences: Sequences) -> Tensor:
    """Write all pairs, then ask for each. Return logits over the values."""
    empty = torch.zeros(len(sequences.values), *layer.config.state_shape)
    state = layer(sequences.written, empty, None, True).state
    return _logits(layer, words, layer(sequences.asked, state, None, False).readings)


def recall_random_keys(layer: DeltaMemLayer, words: Words, generator: torch.Generator, sequences: Sequences) -> Tensor:
    """Do the same with each pair's key and query rotated together at random, separately in every state.

    Their own product stays the same, and the products between different pairs become random.
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
    return layer.correction("o", layer.scale_readings(readings)) @ words.values.mT


def written_and_read(k: Tensor, v: Tensor, log_keep: Tensor, erase: Tensor, write: Tensor, q: Tensor) -> Tensor:
    """Return the readings of the queries after all writes, `[B, N, H, R]`."""
    batch, _, heads, rank = k.shape
    _, state = delta_scan(q, k, v, log_keep, erase, write, k.new_zeros(batch, heads, rank, rank))
    return read_state(state, q)


def predict(config: DeltaMemConfig, count: int, pairs: int, generator: torch.Generator) -> dict[float, float]:
    """Return the recall of the rule itself, without training, by the β of all tokens.

    Keys are drawn from the unit sphere separately for every state, and the code of a value from that of all states
    together. The answer is the code that is most similar to the reading.
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
    """Return β before training."""
    return 1 / (1 + math.exp(-config.beta_bias))


def _accuracy(logits: Tensor, values: Tensor) -> Tensor:
    return (logits.argmax(-1) == values).float()


def train(config: DeltaMemConfig, seed: int, steps: int, watch: bool) -> tuple[DeltaMemLayer, Words, list[list[float]]]:
    """Train all parameters of a layer on sequences of 1 to 64 pairs. Return it, its words, and the recall over time."""
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
            same = torch.Generator().manual_seed(seed + 1)  # the same sequences every time
            mean, _ = asked(partial(recall, layer, words), words, WATCHED, same)
            curve.append([step + 1, mean])
    return layer, words, curve


def _learning_rate(steps: int, step: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def asked(ask: Recall, words: Words, pairs: int, generator: torch.Generator) -> tuple[float, float]:
    """Return the mean recall and half of its 95 % interval over sequences, whose questions share a state."""
    sequences = Sequences.draw(words, max(FEWEST, QUESTIONS // pairs), pairs, generator)
    of_each = _accuracy(ask(sequences), sequences.values).mean(1)
    return of_each.mean().item(), CONFIDENCE * of_each.std().item() / math.sqrt(len(of_each))


@torch.no_grad()
def by_position(ask: Recall, words: Words, generator: torch.Generator) -> list[float]:
    """Return the recall of each of `WATCHED` pairs, in the order of writing."""
    sequences = Sequences.draw(words, POSITION_SEQUENCES, WATCHED, generator)
    return _accuracy(ask(sequences), sequences.values).mean(0).tolist()


@torch.no_grad()
def overlap(layer: DeltaMemLayer, words: Words) -> float:
    """Return the mean squared product of two different keys, which is 1/R for random keys."""
    written = torch.cat([torch.zeros_like(words.keys), words.keys], -1)  # after no value
    k = normalise(per_head(layer.key(written), layer.config))
    products = torch.einsum("nhr,mhr->hnm", k, k).square()
    return (products.sum() - WORDS * len(products)).item() / (len(products) * WORDS * (WORDS - 1))


@torch.no_grad()
def mean_gate(layer: DeltaMemLayer, words: Words) -> float:
    """Return the mean β of a pair."""
    return torch.sigmoid(layer.gate(torch.cat([words.values, words.keys], -1))).mean().item()
