"""Conversations of exported hybrid models match PyTorch, alone and in batches,
undone, joined and taken."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.hybrids import HYBRIDS, OTHER_CACHES, hybrid
from helpers.shared_folder import folder_once
from helpers.tiny import tiny_tokenizer

from deltamem_tool.chat.conversation import Conversation, Sampling, generate_together
from deltamem_tool.chat.torch_engine import TorchModel
from deltamem_tool.memory.file import read_memory
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.runtime.engine import OnnxModel

pytestmark = pytest.mark.slow  # they are exported

TOLERANCE = 1e-4  # of states
TURNS = ("my cat is Bella", "what is the name of my cat? tell me", "no")
OTHERS = ("thank you", "and", "the name of my dog is Max, and that of my cat is Tom")
PORTABLE = "portable"
ENGINES = [
    *((name, "cpu") for name in (*HYBRIDS, *OTHER_CACHES)),
    *((name, PORTABLE) for name in ("lfm2", "qwen3_5_text", "falcon_h1")),  # each kind of state in standard operators
]


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def engines(request, tmp_path_factory) -> tuple[OnnxModel, TorchModel]:
    name, target = request.param
    tokenizer = tiny_tokenizer()
    model = hybrid(name, tokenizer)

    def export(folder) -> None:
        export_onnx(model, tokenizer, folder / "onnx", target=target)

    engine = OnnxModel(folder_once(tmp_path_factory, f"{name}-{target}", export) / "onnx")
    in_pytorch = TorchModel(model, tokenizer)
    engine.stop_tokens = in_pytorch.stop_tokens = frozenset(range(0, len(tokenizer), 9))
    return engine, in_pytorch


def close(actual, expected) -> None:
    assert actual.adapter == expected.adapter
    for layer, state in expected.states.items():
        np.testing.assert_allclose(actual.states[layer], state, rtol=0, atol=TOLERANCE)


def test_turns_and_memories_match_pytorch(engines, tmp_path):
    here, there = map(Conversation, engines)
    for content in TURNS:
        assert here.generate(content, Sampling(8)).tokens == there.generate(content, Sampling(8)).tokens
        close(here.memory, there.memory)
    here.save_memory(tmp_path / "memory.safetensors")
    assert read_memory(tmp_path / "memory.safetensors").shape == there.memory.shape  # without states of the base


def test_conversations_in_a_batch_match_each_alone(engines):
    engine = engines[0]
    together, alone = ([Conversation(engine) for _ in TURNS] for _ in range(2))
    for contents in (TURNS, OTHERS):
        answers = generate_together(together, contents, Sampling(8))
        expected = [one.generate(content, Sampling(8)) for one, content in zip(alone, contents, strict=True)]
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    for one, other in zip(together, alone, strict=True):
        close(one.memory, other.memory)


def test_undone_turns_leave_no_trace(engines):
    conversation = Conversation(engines[0])
    conversation.generate(TURNS[0], Sampling(8))
    memory = conversation.memory
    answer = conversation.generate(TURNS[1], Sampling(8))
    conversation.generate(TURNS[2], Sampling(8))
    assert conversation.undo() and conversation.undo()
    close(conversation.memory, memory)
    assert conversation.generate(TURNS[1], Sampling(8)).tokens == answer.tokens


def test_padding_anywhere_changes_nothing(engines):
    """Covers rows with tokens and padding in any order, in calls of several tokens and of one."""
    engine = engines[0]
    random = np.random.default_rng(0)
    valid = random.random((3, 12)) < 0.6
    valid[:, :2] = [[0, 0], [0, 1], [1, 1]]
    ids = random.integers(10, len(engine.text.ids), valid.shape)
    alone, rows = [], [Conversation(engine)._place.past for _ in range(3)]
    for row, past in enumerate(rows):
        mask = np.ones((1, int(valid[row].sum())), np.int64)
        _, past = engine.step(past, ids[row : row + 1, valid[row]], mask, mask > 0)
        alone.append(engine.memory(past))
        rows[row] = past
    past, start = engine.join([Conversation(engine)._place.past for _ in range(3)]), 0
    for tokens in (5, 1, 4, 1, 1):
        call = slice(start, start + tokens)
        start += tokens
        _, past = engine.step(past, ids[:, call], valid[:, :start].astype(np.int64), valid[:, call])
    actual = engine.memory(past)
    next_ids, longer = ids[:, :1], np.concatenate([valid, np.ones((3, 1), bool)], axis=1).astype(np.int64)
    logits, _ = engine.step(past, next_ids, longer, np.ones((3, 1), bool))
    for row, (memory, row_past) in enumerate(zip(alone, rows, strict=True)):
        for layer, state in memory.states.items():
            np.testing.assert_allclose(actual.states[layer][row], state[0], rtol=0, atol=TOLERANCE)
        selection = engine.take(past, row, np.flatnonzero(valid[row]))
        mask = np.ones((1, int(valid[row].sum()) + 1), np.int64)
        for one in (selection, row_past):
            expected, _ = engine.step(one, next_ids[row : row + 1], mask, np.ones((1, 1), bool))
            np.testing.assert_allclose(logits[row], expected[0], rtol=0, atol=TOLERANCE)


def test_tokens_can_be_removed_only_without_base_states(engines):
    engine = engines[0]
    assert engine.takes_back == (not engine.manifest.interface.base_states)
    ids = np.array([[11, 12, 13, 14]])
    if engine.takes_back:
        start = Conversation(engine)._place.past
        _, past = engine.step(start, ids[:, :3], np.ones((1, 3), np.int64), ids[:, :3] < 0)
        logits = [
            engine.step(one, ids[:, 2:], np.ones((1, 4), np.int64), ids[:, 2:] < 0)[0]
            for one in (
                engine.take(past, 0, np.array([0, 1])),
                engine.step(start, ids[:, :2], np.ones((1, 2), np.int64), ids[:, :2] < 0)[1],
            )
        ]
        np.testing.assert_allclose(*logits, rtol=0, atol=TOLERANCE)
    elif engine.manifest.interface.packed:
        ids = np.array([[11, 12, 13]])
        _, past = engine.step(Conversation(engine)._place.past, ids, np.ones_like(ids), ids > 0)
        with pytest.raises(ValueError, match="after all tokens"):
            engine.take(past, 0, np.array([0, 1]))
