"""Random memories and conversations for property tests, and one function that feeds them to a model.

Run as a program, this file is the process that `Elsewhere` starts, which continues conversations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from helpers.tiny import ARCHITECTURES, PAD, SPECIAL, VOCABULARY, randomise, tiny_model
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from deltamem_tool import DeltaMemConfig, MemoryCache, MemoryState, attach
from deltamem_tool.config import BRANCHES, GATES, GRANULARITIES, MAX_RANK, UPDATE_RULES
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.segments.tags import SegmentTag

# Float32 against float32: the same sums in another order, with other columns and positions. Relative to the
# largest number compared, or absolute if that is below 1. In 28,000 comparisons, the largest error was 7e-6; leaving
# out one write changed the state by more than 4e-4 in 98 of 100 cases.
TOLERANCE = 5e-5
WIDTH = 32
NEVER = VOCABULARY - 1  # a stop token that occurs in no text


def examples(count: int) -> settings:
    """Hypothesis settings: reproducible examples, without a deadline."""
    slow = [HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


@dataclass(frozen=True)
class Setup:
    """The description of a patched model. Equal setups give bit-identical models in any process."""

    architecture: str
    attention: str
    seed: int
    options: dict

    def model(self) -> PreTrainedModel:
        """The model with random weights; the gates' biases are close to `beta_bias`."""
        config = DeltaMemConfig(**self.options)
        model = tiny_model(self.architecture, self.seed, self.attention, hidden_size=max(WIDTH, config.rank))
        adapter = randomise(attach(model, config), self.seed)
        with torch.no_grad():
            for name, bias in adapter.named_parameters():
                if name.endswith(("gate.bias", "decay.bias")):
                    bias.add_(config.beta_bias if name.endswith("gate.bias") else -config.beta_bias)
        return model

    @property
    def segmented(self) -> bool:
        return self.options["granularity"] != "token"


@dataclass(frozen=True)
class Text:
    """The tokens of one conversation, their segment tags, if any, and which of them write."""

    tokens: tuple[int, ...]
    tags: tuple[int, ...]
    writes: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __add__(self, other: Text) -> Text:
        return Text(self.tokens + other.tokens, self.tags + other.tags, self.writes + other.writes)

    def part(self, start: int, end: int | None = None) -> Text:
        return Text(self.tokens[start:end], self.tags[start:end], self.writes[start:end])


NOTHING = Text((), (), ())


@st.composite
def setups(draw: st.DrawFn, **fixed) -> Setup:
    """Any valid combination of options; those in `fixed` are kept."""
    heads = draw(st.lists(st.sampled_from(BRANCHES), min_size=1, unique=True).map(tuple))
    rule = draw(st.sampled_from(UPDATE_RULES))
    options = {
        "rank": draw(st.sampled_from((*range(1, 9), *range(1, 9), *range(1, 9), 16, 24, MAX_RANK))),
        "state_heads": draw(st.integers(1, 4)),
        "branches": heads,
        "alpha": draw(st.sampled_from((1.0, 4.0, 16.0))),
        "layers": draw(st.sampled_from(("all", (0,), (1,), (1, 0), "front:1", "middle:1", "back:1", "front:2"))),
        "granularity": draw(st.sampled_from(GRANULARITIES)),
        "update_rule": rule,
        "couple_lambda": rule == "no_lambda" or draw(st.booleans()),
        "gates": draw(st.sampled_from(GATES)),
        "beta_bias": draw(st.sampled_from((-6.0, -1.5, 0.0, 2.0))),
        "delta_scale": draw(st.sampled_from(("fixed", "layer", "branch"))),
        "delta_scale_max": draw(st.sampled_from((1.5, 2.0))),
        "o_norm": "o" in heads and draw(st.booleans()),
        "o_norm_eps": draw(st.sampled_from((1e-6, 1e-3))),
    }
    architecture, attention = draw(st.sampled_from(ARCHITECTURES)), draw(st.sampled_from(("eager", "sdpa")))
    return Setup(architecture, attention, draw(st.integers(0, 3)), options | fixed)


def segmented_setups() -> st.SearchStrategy[Setup]:
    return st.sampled_from(GRANULARITIES[1:]).flatmap(lambda granularity: setups(granularity=granularity))


@st.composite
def texts(draw: st.DrawFn, least: int = 1, most: int = 16) -> Text:
    """`least` to `most` tokens, or several times that, because the scan treats long texts differently."""
    token = st.tuples(
        st.integers(len(SPECIAL), NEVER - 1),
        st.sampled_from((SegmentTag.INSIDE, SegmentTag.OUTSIDE, SegmentTag.LAST)),
        st.sampled_from((True, True, True, False)),
    )
    drawn = draw(st.lists(token, min_size=least, max_size=most))
    return Text(*zip(*drawn, strict=True)) if drawn else NOTHING


@st.composite
def long_texts(draw: st.DrawFn) -> Text:
    """A repeated text, because the scan treats long texts differently, in chunks of 32 tokens."""
    text, whole = draw(texts(4, 20)), NOTHING
    for _ in range(draw(st.integers(1, 3))):
        whole += text
    return whole


def rooms(tokens: int) -> st.SearchStrategy[int | None]:
    """A growing cache (None), or one with room for this many tokens or a few more."""
    return st.none() | st.integers(tokens, tokens + 4)


def new_cache(model: PreTrainedModel, memory: MemoryState | None = None, room: int | None = None) -> MemoryCache:
    return MemoryCache(model, memory=memory, max_length=room)


def cuts(text: int) -> st.SearchStrategy[list[int]]:
    """Random positions at which to split a text into pieces."""
    return st.lists(st.integers(1, text - 1), unique=True, max_size=6).map(sorted) if text > 1 else st.just([])


@dataclass(frozen=True)
class Batch:
    """Texts as the tensors of one call, `[B, T]` each; `valid` is None if no row is padded."""

    ids: Tensor
    tags: Tensor
    writes: Tensor
    valid: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Text]) -> Batch:
        """A batch of texts of one length."""
        return cls(
            torch.tensor([row.tokens for row in rows]),
            torch.tensor([row.tags for row in rows], dtype=torch.int8),
            torch.tensor([row.writes for row in rows]),
        )

    @classmethod
    def padded(cls, rows: Sequence[Text], places: Sequence[Sequence[int]], fill: int = PAD) -> Batch:
        """A batch of texts of any length at the given columns. The write mask is true for padding, to no effect."""
        width = max(row[-1] for row in places) + 1
        ids = torch.full((len(rows), width), fill)
        tags = torch.full((len(rows), width), SegmentTag.OUTSIDE, dtype=torch.int8)
        writes, valid = (torch.full((len(rows), width), value) for value in (True, False))
        for n, (row, columns) in enumerate(zip(rows, places, strict=True)):
            ids[n, columns] = torch.tensor(row.tokens)
            tags[n, columns] = torch.tensor(row.tags, dtype=torch.int8)
            writes[n, columns] = torch.tensor(row.writes)
            valid[n, columns] = True
        return cls(ids, tags, writes, valid)

    @property
    def positions(self) -> Tensor:
        """Position ids as `generate` makes them: each token's index in its row without padding, 0 for left padding."""
        assert self.valid is not None
        return (self.valid.long().cumsum(1) - 1).clamp_min(0)


def places_of(lengths: Sequence[int], side: str) -> list[list[int]]:
    width = max(lengths)
    return [list(range(width)[width - n :]) if side == "left" else list(range(n)) for n in lengths]


@torch.no_grad()
def feed(
    model: PreTrainedModel,
    cache: MemoryCache,
    batch: Batch,
    bounds: Sequence[int] = (),
    positions: bool = False,
    ahead: bool = False,
    by_hand: bool = False,
    run: PreTrainedModel | None = None,
) -> Tensor:
    """Logits `[B, T, vocabulary]` of `batch` in pieces that end at `bounds`.

    Args:
        positions: pass every token's position; otherwise, the model counts columns.
        ahead: set the tags of all pieces before the first one.
        by_hand: end a segment that ends with its piece by `end_segment()`, for one row.
        run: called instead of the model, for example the compiled model.
    """
    segmented = adapter_of(model).config.granularity != "token"
    logits, mask = [], batch.valid
    for a, b in pairwise([0, *bounds, batch.ids.shape[1]]):
        tags, writes = batch.tags[:, a:b], batch.writes[:, a:b]
        valid = torch.ones_like(writes) if mask is None else mask[:, a:b]
        ends = by_hand and segmented and bool(tags[0, -1] == SegmentTag.LAST) and bool(writes[0, -1])
        if ends:
            tags = torch.cat([tags[:, :-1], torch.full_like(tags[:, -1:], SegmentTag.INSIDE)], dim=1)
        if segmented and not ahead:  # untagged tokens are inside a segment
            cache.segment_tags = None if bool((tags == SegmentTag.INSIDE)[valid].all()) else tags
        elif segmented and a == 0:
            cache.segment_tags = batch.tags
        some = writes[valid]
        cache.write = writes if bool(some.any()) != bool(some.all()) else bool(some.all())
        inputs = {"cache": cache}
        if mask is not None:
            inputs["attention_mask"] = mask[:, :b].long()
        if positions:
            inputs["position_ids"] = batch.positions[:, a:b] if mask is not None else torch.arange(a, b)[None]
        logits.append((run or model)(batch.ids[:, a:b], **inputs).logits)
        if ends:
            cache.end_segment()
    return torch.cat(logits, dim=1)


def alone(model: PreTrainedModel, text: Text, memory: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
    """The reference for all other ways: one conversation in one call. Logits `[T, vocabulary]`, and the memory."""
    cache = MemoryCache(model, memory=memory)
    return feed(model, cache, Batch.of([text]))[0], cache.memory


def memory_of(model: PreTrainedModel, text: Text) -> MemoryState | None:
    return alone(model, text)[1] if len(text) else None


def same(actual: Tensor, expected: Tensor, label: str) -> None:
    assert actual.shape == expected.shape, label
    error, size = (actual - expected).abs().max(), expected.abs().max().clamp_min(1.0)
    ratio = float(error / size)
    assert ratio <= TOLERANCE, f"{label}: off by {ratio:.1e} of {float(size):.3g}"


def same_memory(memory: MemoryState, expected: MemoryState, row: int = 0) -> None:
    """`row` of `memory` is `expected`, which has one: states, open segments and the number of their tokens."""
    assert sorted(memory.layers) == sorted(expected.layers) and memory.adapter == expected.adapter
    assert int(memory.open_tokens[row]) == int(expected.open_tokens[0]), "tokens of the open segment"
    for layer, state in expected.layers.items():
        same(memory.layers[layer][row], state[0], f"state of layer {layer}")
    for layer, segment in expected.open_segments.items():
        same(memory.open_segments[layer][row], segment[0], f"open segment of layer {layer}")


def equal(memory: MemoryState, expected: MemoryState) -> bool:
    """Whether two memories are bit-identical."""
    return memory.adapter == expected.adapter and all(
        mine.keys() == other.keys() and all(torch.equal(mine[layer], other[layer]) for layer in other)
        for mine, other in ((memory.layers, expected.layers), (memory.open_segments, expected.open_segments))
    )


class Elsewhere:
    """A process that knows only a setup, a memory file and the rest of the text."""

    def __init__(self) -> None:
        root = Path(__file__).resolve().parents[2]
        paths = [str(root / "tests"), str(root / "recipes"), str(root)]
        path = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def resume(self, setup: Setup, memory: Path, text: Text, bounds: list[int]) -> tuple[Tensor, MemoryState]:
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"setup": asdict(setup), "memory": str(memory), "text": asdict(text), "bounds": bounds}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline().strip()
        assert answer == "done", f"the other process said {answer!r}; its error is above"
        return load_file(f"{memory}.logits")["logits"], MemoryState.load(f"{memory}.after")

    def close(self) -> None:
        self._process.communicate()  # it ends when its input ends


def _serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        setup, memory = Setup(**request["setup"]), request["memory"]
        text = Text(*(tuple(request["text"][name]) for name in ("tokens", "tags", "writes")))
        model = setup.model()
        cache = MemoryCache(model, memory=MemoryState.load(memory))
        logits = feed(model, cache, Batch.of([text]), request["bounds"])
        save_file({"logits": logits}, f"{memory}.logits")
        cache.memory.save(f"{memory}.after")
        print("done", flush=True)


if __name__ == "__main__":
    _serve()
