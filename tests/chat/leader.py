"""Conversations run by the processes of a launch, led by the first; a forked process can import the functions."""

from __future__ import annotations

import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.tiny import tiny_tokenizer

from deltamem_tool import Conversation, TorchModel
from deltamem_tool.base_model.launch import join_launched, launch_rank
from deltamem_tool.chat.conversation import Engine, Sampling, generate_together
from deltamem_tool.chat.leader_model import LeaderModel, follow_leader
from deltamem_tool.cli.engines import load_on
from deltamem_tool.errors import DataError, DeltaMemError
from deltamem_tool.memory.file import StoredMemory

SAMPLING = Sampling(max_new_tokens=6, temperature=0.8, seed=4)
UNKNOWN = 10**6  # the id of no token


class Watched(TorchModel):
    """A model that records its last memory, and the largest number of pasts that existed at once."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.last: StoredMemory | None = None
        self.most = 0
        self._pasts: list[weakref.ref] = []

    def step(self, *args: Any) -> Any:
        logits, past = super().step(*args)
        self.last = self.memory(past)
        self._pasts = [each for each in self._pasts if each() is not None] + [weakref.ref(past)]
        self.most = max(self.most, len(self._pasts))
        return logits, past


def answers_and_memories(engine: Engine) -> tuple[Any, list[StoredMemory]]:
    """The answers and final memories of two conversations that go through everything that can happen to one."""
    first, second = Conversation(engine, window=48), Conversation(engine)
    texts = [first.generate("My dog is Rex.", SAMPLING).text]
    memory = first.memory
    try:
        engine.step(engine.start(memory), *(np.full((1, 1), one) for one in (UNKNOWN, 1, True)), np.ones((1, 1), bool))
    except DataError as error:
        texts.append(error.what)

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    first.generate("And?", SAMPLING, interrupt)
    first.undo()
    first.memory = memory
    for _ in range(3):  # turns leave the window
        texts.append(first.generate("What is the name of my dog?", SAMPLING).text)
    answers = generate_together([first, second], ["Well?", "Good morning, how are you?"], SAMPLING)
    texts += [answer.text for answer in answers]
    last = second.generate("And?", SAMPLING)
    return (texts, last.tokens, first.context, likeliest(engine, memory)), [first.memory, second.memory]


def likeliest(engine: Engine, memory: StoredMemory) -> int:
    """The next token of one of two rows, after the other has left."""
    ids, ones = np.array([[7, 8, 9], [9, 8, 7]]), np.ones((2, 3), np.int64)
    end = np.zeros((2, 3), bool) if engine.memory_shape.segment_width else None
    pasts = engine.join([engine.start(memory)] * 2)
    _, pasts = engine.step(pasts, ids, ones, ones.astype(bool), end)
    alone = engine.keep(pasts, {1: np.arange(3)})
    logits, _ = engine.step(
        alone, ids[:1, :1], ones[:1, :1].repeat(4, 1), ones[:1, :1].astype(bool), None if end is None else end[:1, :1]
    )
    return int(logits[0].argmax())


def talk(folder: Path) -> None:
    """Lead or follow, and write the result."""
    torch.set_num_threads(1)
    model, number = _model(folder), launch_rank()
    words, memories = None, []
    if number == 0:
        led = LeaderModel(model)
        words, memories = answers_and_memories(led)
        led.close()
    else:
        follow_leader(model)
    report = {"words": words, "memories": memories, "last": model.last, "most": model.most}
    torch.save(report, folder / f"led-{number}.pt")


def lose(folder: Path, ready: Path, go: Path) -> None:
    """Lead or follow, and write how it ends. The first process waits for `go` in between."""
    torch.set_num_threads(1)
    model, number = _model(folder), launch_rank()
    errors = []
    if number == 0:
        conversation = Conversation(LeaderModel(model))
        conversation.generate("My dog is Rex.", SAMPLING)
        ready.touch()
        while not go.exists():
            time.sleep(0.05)
        for _ in range(2):
            try:
                conversation.generate("And?", SAMPLING)
            except DeltaMemError as error:
                errors.append(str(error))
    else:
        try:
            follow_leader(model)
        except DeltaMemError as error:
            errors.append(str(error))
    (folder / f"lost-{number}").write_text("\n\n".join(errors))


def _model(folder: Path) -> Watched:
    join_launched()
    return Watched(load_on("tp", str(folder / "adapter"), {}), tiny_tokenizer())
