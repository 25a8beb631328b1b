"""Many concurrent conversations over one model: each is bit-identical to the same one run alone."""

from __future__ import annotations

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from helpers.conversations import NEVER, Batch, Text, equal, examples, feed, setups
from helpers.tiny import PAD, SPECIAL
from hypothesis import given
from hypothesis import strategies as st

from deltamem_tool import MemoryCache
from deltamem_tool.config import GRANULARITIES
from deltamem_tool.segments.tags import SegmentTag

CONVERSATIONS = 16
WORKERS = 8
OFTEN = 1e-5  # seconds after which Python switches to another thread


@dataclass
class Conversation:
    """A conversation that proceeds in turns: a piece of text is fed, or an answer generated."""

    cache: MemoryCache
    turns: list[Text | int]  # a text, or how many tokens to generate
    heard: list[torch.Tensor]
    last: int = PAD  # the last generated token, which has not been fed

    def turn(self, model) -> None:
        item = self.turns[len(self.heard)]
        if isinstance(item, Text):
            self.heard.append(feed(model, self.cache, Batch.of([item])))
            return
        length = self.cache.get_seq_length()
        self.cache.write, self.cache.segment_tags = True, None
        output = model.generate(
            torch.tensor([[self.last]]),
            attention_mask=torch.ones(1, length + 1, dtype=torch.long),
            cache=self.cache,
            max_new_tokens=item,
            do_sample=False,
            eos_token_id=NEVER,
            pad_token_id=PAD,
            suppress_tokens=[PAD, NEVER],
        )
        self.last = int(output[0, -1])
        self.heard.append(output)


def conversations(model, seed: int) -> list[Conversation]:
    choose = random.Random(seed)

    def text() -> Text:
        length = choose.randint(1, 6)
        return Text(
            tuple(choose.randrange(len(SPECIAL), NEVER) for _ in range(length)),
            tuple(
                choose.choice((SegmentTag.INSIDE, SegmentTag.INSIDE, SegmentTag.OUTSIDE, SegmentTag.LAST))
                for _ in range(length)
            ),
            tuple(choose.random() < 0.8 for _ in range(length)),
        )

    talks = []
    for _ in range(CONVERSATIONS):
        turns = [text(), *(choose.choice((text(), text(), choose.randint(1, 3))) for _ in range(choose.randint(1, 6)))]
        talks.append(Conversation(MemoryCache(model), turns, []))
    return talks


@pytest.fixture(autouse=True, scope="module")
def frequent_switches():
    """Python switches between threads very often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(OFTEN)
    yield
    sys.setswitchinterval(before)


def in_threads(model, talks: list[Conversation], seed: int) -> None:
    """Run eight threads, each of which takes any free conversation for one turn, repeatedly."""
    choose, lock = random.Random(seed), threading.Lock()
    waiting = list(talks)
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        start.wait(timeout=60)
        while True:
            with lock:
                if not waiting:
                    return  # the others finish their turns
                talk = waiting.pop(choose.randrange(len(waiting)))
                inside += 1
                most = max(most, inside)
            try:
                talk.turn(model)
            finally:
                with lock:
                    inside -= 1
                    if len(talk.heard) < len(talk.turns):
                        waiting.append(talk)

    start = threading.Barrier(WORKERS)
    with ThreadPoolExecutor(WORKERS) as pool:
        for future in [pool.submit(work) for _ in range(WORKERS)]:
            future.result(timeout=120)
    for talk in waiting:
        raise AssertionError(f"a conversation stopped after {len(talk.heard)} turns")
    assert most > 1, "no two conversations were in the model at once"


@pytest.mark.slow
@pytest.mark.parametrize("granularity", GRANULARITIES)
@examples(3)
@given(st.data())
def test_sixteen_conversations_in_eight_threads_match_each_one_alone(granularity, data):
    setup, seed = data.draw(setups(granularity=granularity), "setup"), data.draw(st.integers(0, 2**16), "seed")
    model = setup.model()
    alone, together = conversations(model, seed), conversations(model, seed)
    for talk in alone:
        for _ in talk.turns:
            talk.turn(model)
    in_threads(model, together, seed)
    for n, (talk, expected) in enumerate(zip(together, alone, strict=True)):
        for turn, (heard, wanted) in enumerate(zip(talk.heard, expected.heard, strict=True)):
            assert torch.equal(heard, wanted), f"turn {turn} of conversation {n}"
        assert equal(talk.cache.memory, expected.cache.memory), f"memory of conversation {n}"
