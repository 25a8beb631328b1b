"""Conversations on a base sharded over two processes: the first leads, and the other follows."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from chat.leader import Watched, answers_and_memories, lose, talk
from helpers.processes import started, together
from helpers.tiny import tiny_tokenizer
from memory.test_tensor_parallel import CASES, PROCESSES, TOLERANCE, make

from deltamem_tool.cli.engines import load_on

pytestmark = pytest.mark.slow

LIMIT = 60  # seconds in which a process must notice that another one has ended


@pytest.mark.parametrize("name", CASES)
def test_two_processes_answer_and_remember_like_one(name, tmp_path):
    """Covers a rejected call, an interruption, an undone turn and turns that have left the window."""
    folder = make(tmp_path, name)
    together(PROCESSES, talk, folder)
    alone = Watched(load_on("cpu", str(folder / "adapter"), {}), tiny_tokenizer())
    words, memories = answers_and_memories(alone)
    first, other = (torch.load(folder / f"led-{number}.pt", weights_only=False) for number in range(PROCESSES))
    assert first["words"] == words and "does not know" in words[0][1]
    for actual, expected in zip(first["memories"], memories, strict=True):
        for layer, state in expected.states.items():
            np.testing.assert_allclose(actual.states[layer], state, atol=TOLERANCE, rtol=0)
    for layer, state in other["last"].states.items():
        assert np.array_equal(state, first["last"].states[layer])
    assert other["most"] <= alone.most + 1  # a past is released with the next call


@pytest.mark.parametrize("lost", range(PROCESSES))
def test_the_end_of_a_process_is_reported(lost, tmp_path):
    """The other process names it, and the first accepts no further call, since the two would be out of step."""
    folder, ready, go = make(tmp_path / "model", "qwen3"), tmp_path / "ready", tmp_path / "go"
    with started(PROCESSES, lose, folder, ready, go) as processes:
        while not ready.exists():
            assert all(process.is_alive() for process in processes)
            time.sleep(0.05)
        processes[lost].kill()
        go.touch()
        processes[1 - lost].join(LIMIT)
        assert processes[1 - lost].exitcode == 0
    lines = (folder / f"lost-{1 - lost}").read_text().split("\n\n")
    assert lines[0].startswith(f"Process {lost} (pid {processes[lost].pid}) of this run has ended.")
    assert all(line.startswith("The processes of this run are no longer in step.") for line in lines[1:])
    assert len(lines) == 1 + lost
