"""Conversations in ONNX Runtime: the same tokens and memories as in PyTorch, and memory files that both read."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.greedy import continue_greedily

from deltamem_tool.chat.conversation import Conversation, Sampling, generate_together
from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.chat.generation import answer_prompts
from deltamem_tool.chat.torch_engine import TorchModel
from deltamem_tool.errors import ConfigError, DataError, ExportError, MemoryStateError
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.file import StoredMemory, read_memory
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.onnx.runtime.engine import OnnxModel

TOLERANCE = 1e-4
USER = {"role": "user", "content": "Hello"}
TURNS = ("My cat is called Zoë 🐈.", "What is she called?")


# Each is exported for the first test that uses it.
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "message_export")]


def in_pytorch(exported, turns, new_tokens, stop_tokens=None, memory=None):
    """Generated tokens of each turn, and the memory after them, by `model.generate` on one cache."""
    cache = MemoryCache(exported.model, memory)
    ids, answers = torch.zeros(1, 0, dtype=torch.long), []
    for turn in turns:
        text = f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
        if answers:
            text = ("\n" if ids[0, -1] == 257 else "<|im_end|>\n") + text
        ids = torch.cat([ids, exported.tokenizer(text, return_tensors="pt").input_ids], dim=1)
        prompt = ids.shape[1]
        ids = continue_greedily(exported.model, ids, cache, new_tokens, 0, stop_tokens)
        answers.append(ids[0, prompt:].tolist())
    return answers, cache.memory


def assert_close(memory: StoredMemory, expected: MemoryState) -> None:
    assert memory.states.keys() == expected.layers.keys()
    for layer, state in memory.states.items():
        torch.testing.assert_close(torch.from_numpy(state), expected.layers[layer], rtol=0, atol=TOLERANCE)
    for layer, segment in memory.open_segments.items():
        torch.testing.assert_close(torch.from_numpy(segment), expected.open_segments[layer], rtol=0, atol=TOLERANCE)


def stopping_at(folder, tokens) -> OnnxModel:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": tokens}))
    return OnnxModel(folder)


def test_greedy_turns_match_generate(exported):
    conversation = Conversation(OnnxModel(exported.folder))
    answers = [conversation.generate(turn, Sampling(8)) for turn in TURNS]
    expected, memory = in_pytorch(exported, TURNS, 8)
    assert [list(answer.tokens) for answer in answers] == expected
    assert not any(answer.stopped for answer in answers)
    assert_close(conversation.memory, memory)


def test_several_prompts_are_answered_in_one_batch(exported):
    model, prompts = OnnxModel(exported.folder), ["my cat", "what is it?"]
    empty = empty_memory(model)
    memory = StoredMemory({i: np.repeat(state, 2, 0) for i, state in empty.states.items()}, {}, model.adapter)
    answers = answer_prompts(model, memory, [model.text.encode(prompt) for prompt in prompts], 6)
    in_torch = TorchModel(exported.model, exported.tokenizer)
    expected = answer_prompts(in_torch, memory, [model.text.encode(prompt) for prompt in prompts], 6)
    assert answers == expected


def test_all_logits_are_available_if_the_graph_returns_them(qwen3, llama):
    ids, every = np.array([[72, 73, 74]]), np.ones((1, 3), bool)
    model, in_torch = OnnxModel(llama.folder), TorchModel(llama.model, llama.tokenizer)
    logits, expected = (
        engine.step(engine.start(empty_memory(engine)), ids, every.astype(np.int64), every, all_positions=True)[0]
        for engine in (model, in_torch)
    )
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    model = OnnxModel(qwen3.folder)
    with pytest.raises(ExportError, match="no logits of every position"):
        model.step(model.start(empty_memory(model)), ids, every.astype(np.int64), every, all_positions=True)


def test_every_stop_token_stops(qwen3, folder):
    free = Conversation(OnnxModel(folder)).generate(TURNS[0], Sampling(8)).tokens
    late, early = free[5], free[2]
    assert free.index(late) > free.index(early)
    for stop_tokens, at in (([late, early], early), ([early, late], early), (late, late), ([257], None)):
        answer = Conversation(stopping_at(folder, stop_tokens)).generate(TURNS[0], Sampling(8))
        assert answer.stopped == (at is not None)
        assert answer.tokens == (free[: free.index(at) + 1] if at is not None else free)


def test_mapping_quantised_weights_raises(folder):
    file = folder / "deltamem_onnx.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantize": "int4"}))
    with pytest.raises(ConfigError, match="dozens of times as long"):
        OnnxModel(folder, map_weights=True)
    OnnxModel(folder)


def test_the_window_defaults_to_the_positions_of_the_model(qwen3, folder):
    positions = qwen3.model.config.max_position_embeddings
    assert TorchModel(qwen3.model, qwen3.tokenizer).max_length == positions
    talk = Conversation(OnnxModel(folder))
    assert talk.context.window == positions
    with pytest.raises(ConfigError, match=f"at most {positions}"):
        Conversation(talk.engine, window=positions + 1)
    file = folder / "deltamem_onnx.json"
    older = json.loads(file.read_text())
    del older["interface"]["positions"]
    file.write_text(json.dumps(older))
    assert OnnxModel(folder).max_length is None


def test_a_token_unknown_to_the_graph_is_named(folder):
    """onnxruntime would read another row of the embedding, or crash."""
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    size = OnnxModel(folder).manifest.interface.vocab_size
    words["added_tokens"].append({**words["added_tokens"][-1], "id": size, "content": "[PAD]"})
    file.write_text(json.dumps(words))
    talk = Conversation(OnnxModel(folder))
    with pytest.raises(DataError, match=r"does not know: '\[PAD\]'"):
        talk.generate("my dog is [PAD]")
    assert talk.context.tokens == 0 and talk.generate("my dog").tokens


def test_the_end_token_of_the_template_stops_too(qwen3, folder):
    """The model's generation config has no end token; the exported one has it, for every runtime."""
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [257]
    assert qwen3.model.generation_config.eos_token_id is None
    assert stopping_at(folder, 3).stop_tokens == {3, 257}
    assert TorchModel(qwen3.model, qwen3.tokenizer).stop_tokens == {257}


def test_a_conversation_continues_after_its_end_of_turn(qwen3, folder):
    """The end-of-turn token stops generation. As in PyTorch, it is fed once, by the template."""
    weight = qwen3.model.lm_head.weight
    saved = weight.detach().clone()
    model = stopping_at(folder, [257])
    free = Conversation(model).generate(TURNS[0], Sampling(5)).tokens
    # The fifth token becomes the end of the turn: a step that swaps their logits, on both sides.
    swap = free[4]
    assert swap not in free[:4]
    step = model.step

    def swapped(*inputs):
        logits, past = step(*inputs)
        logits[..., [swap, 257]] = logits[..., [257, swap]]
        return logits, past

    model.step = swapped
    conversation = Conversation(model)
    answers = [conversation.generate(turn, Sampling(8)) for turn in TURNS]
    with torch.no_grad():
        weight[[swap, 257]] = saved[[257, swap]]
    try:
        expected, memory = in_pytorch(qwen3, TURNS, 8, stop_tokens=[257])
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    assert answers[0].stopped and answers[0].tokens[-1] == 257
    assert [list(answer.tokens) for answer in answers] == expected
    assert_close(conversation.memory, memory)


def test_memory_files_move_between_onnx_runtime_and_pytorch(exported, tmp_path):
    model = OnnxModel(exported.folder)
    conversation = Conversation(model)
    conversation.generate(TURNS[0], Sampling(4))
    conversation.save_memory(tmp_path / "memory.safetensors")
    memory = MemoryState.load(tmp_path / "memory.safetensors")
    assert memory.adapter == exported.manifest.adapter
    for layer, state in conversation.memory.states.items():
        assert state.any() and np.array_equal(memory.layers[layer].numpy(), state)

    expected, after = in_pytorch(exported, TURNS[1:], 6, memory=memory)
    resumed = Conversation(model, read_memory(tmp_path / "memory.safetensors"))
    assert list(resumed.generate(TURNS[1], Sampling(6)).tokens) == expected[0]
    assert_close(resumed.memory, after)

    after.save(tmp_path / "after.safetensors")
    for layer, state in read_memory(tmp_path / "after.safetensors").states.items():
        assert np.array_equal(after.layers[layer].numpy(), state)


def test_a_memory_of_another_adapter_raises(qwen3, llama, tmp_path):
    file = tmp_path / "memory.safetensors"
    MemoryState({i: torch.zeros(1, 2, 4, 4) for i in (0, 1)}, "another").save(file)
    with pytest.raises(MemoryStateError, match="another adapter"):
        Conversation(OnnxModel(qwen3.folder), read_memory(file))
    Conversation(OnnxModel(llama.folder)).save_memory(file)
    with pytest.raises(MemoryStateError):
        Conversation(OnnxModel(qwen3.folder), read_memory(file))


def test_a_memory_that_does_not_fit_raises(qwen3):
    model = OnnxModel(qwen3.folder)
    with pytest.raises(MemoryStateError, match="does not fit"):
        Conversation(model, StoredMemory({0: np.zeros((1, 2, 4, 4), np.float32)}, {}, model.adapter))
    with pytest.raises(MemoryStateError, match="one conversation"):
        Conversation(model, StoredMemory({i: np.zeros((2, 2, 4, 4), np.float32) for i in (0, 1)}, {}, model.adapter))


def test_a_conversation_that_does_not_write_keeps_its_memory(qwen3):
    model = OnnxModel(qwen3.folder)
    first = Conversation(model)
    first.generate(TURNS[0], Sampling(2))
    second = Conversation(model, first.memory, write=False)
    second.generate(TURNS[1], Sampling(2))
    for layer, state in first.memory.states.items():
        assert np.array_equal(second.memory.states[layer], state)


def test_conversations_of_one_model_are_independent(qwen3):
    """They do not affect each other in turn or in several threads."""
    model = OnnxModel(qwen3.folder)

    def talk(number):
        conversation = Conversation(model)
        turns = (TURNS[number % 2], TURNS[(number + 1) % 2], "ok" * (1 + number % 3))
        return [conversation.generate(turn, Sampling(6)) for turn in turns], conversation.memory.tensors()

    alone = [talk(number) for number in range(6)]
    with ThreadPoolExecutor(6) as threads:
        for (answers, memory), (expected, expected_memory) in zip(threads.map(talk, range(6)), alone, strict=True):
            assert answers == expected
            for name, tensor in memory.items():
                assert np.array_equal(tensor, expected_memory[name])


def both(exported, stop_tokens=frozenset()) -> tuple[OnnxModel, TorchModel]:
    engines = OnnxModel(exported.folder), TorchModel(exported.model, exported.tokenizer)
    for engine in engines:
        engine.stop_tokens = stop_tokens
    return engines


@pytest.mark.parametrize("exported", ["qwen3", *OTHERS], indirect=True)
def test_a_conversation_is_the_same_in_both_runtimes(exported, tmp_path):
    """Covers turns, undo, a full window, a batch, and memories with open segments that move between the runtimes."""
    stop_tokens = frozenset(range(0, 256, 9))
    conversations = [Conversation(engine, window=170) for engine in both(exported, stop_tokens)]
    replies = []
    for conversation in conversations:
        answers = [conversation.generate([{"role": "system", "content": "Hi."}, USER], Sampling(6))]
        answers += [conversation.generate(turn, Sampling(6)) for turn in (*TURNS, *TURNS)]
        assert conversation.context.dropped > 0
        assert conversation.undo() and conversation.undo()
        answers.append(conversation.generate("Go on", Sampling(6, stop=("z",), repetition_penalty=1.5)))
        replies.append((answers, conversation.messages, conversation.context))
    assert replies[0] == replies[1]
    in_onnx, in_torch = (conversation.memory for conversation in conversations)
    assert_close(in_onnx, memory_of(in_torch))

    for source, other in (conversations, conversations[::-1]):
        source.save_memory(tmp_path / "memory")
        after = []
        for conversation in (source, other):
            fresh = Conversation(conversation.engine, read_memory(tmp_path / "memory"))
            after.append((fresh.generate(TURNS[0], Sampling(6)), fresh.memory))
        assert after[0][0] == after[1][0]
        assert_close(after[0][1], memory_of(after[1][1]))


def memory_of(memory: StoredMemory) -> MemoryState:
    states, segments = (
        {i: torch.from_numpy(array) for i, array in part.items()} for part in (memory.states, memory.open_segments)
    )
    return MemoryState(states, memory.adapter, segments)


@pytest.mark.parametrize("exported", ["qwen3", *OTHERS], indirect=True)
def test_answers_in_a_batch_match_answers_alone(exported):
    model, _ = both(exported, frozenset(range(0, 256, 9)))
    contents = ("Hello", TURNS[0], "a much longer text than the others are")
    together, alone = ([Conversation(model) for _ in contents] for _ in range(2))
    for number in range(3):
        answers = generate_together(together, contents[number:] + contents[:number], Sampling(8))
        expected = [
            one.generate(content, Sampling(8))
            for one, content in zip(alone, contents[number:] + contents[:number], strict=True)
        ]
        assert answers == expected
        for one, other in zip(together, alone, strict=True):
            assert one.context == other.context
            assert_close(one.memory, memory_of(other.memory))


def test_sampling_follows_its_seed_and_top_p(qwen3):
    model = OnnxModel(qwen3.folder)

    def say(**options):
        return Conversation(model).generate(TURNS[0], Sampling(8, **options)).tokens

    assert say(temperature=2.0, seed=1) == say(temperature=2.0, seed=1)
    assert say(temperature=2.0, seed=1) != say(temperature=2.0, seed=2)
    assert say(temperature=2.0, top_p=1e-9, seed=1) == say()
    with pytest.raises(ConfigError):
        say(top_p=0.0)


def test_streamed_pieces_add_up_to_the_answer(qwen3):
    pieces = []
    answer = Conversation(OnnxModel(qwen3.folder)).generate(TURNS[0], Sampling(12), on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert answer.text == qwen3.tokenizer.decode(answer.tokens, skip_special_tokens=True)
