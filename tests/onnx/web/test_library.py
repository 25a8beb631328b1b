"""The JavaScript library of `web/`: conversations in it, in Node, are Python's."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.hybrids import hybrid
from helpers.tiny import tiny_tokenizer
from helpers.web_library import in_javascript, library_folder, talk, text_of

from deltamem_tool import Conversation, OnnxModel
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.chat.torch_engine import TorchModel
from deltamem_tool.memory.file import memory_bytes, memory_from_bytes
from deltamem_tool.onnx.contract import MODEL_FILE
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.manifest import Manifest
from deltamem_tool.page.unpacked import write_unpacked

pytestmark = [pytest.mark.node, pytest.mark.slow]

TOLERANCE = 1e-4  # of logits and states in float32, over whole conversations
INT4_TOLERANCE = 0.1  # for logits, compared with ONNX Runtime's CPU provider
TURNS = ("My dog is Rex.", "I've moved to Zürich 🏔, and\n  have a cat.  Her name? Dr. Who! ", "Who am I?")
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TURNS[0]}]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    return library_folder(tmp_path_factory.mktemp("node") / "scripts")


class Recorded:
    """An engine that records its logits."""

    def __init__(self, engine) -> None:
        self._engine, self.logits = engine, []

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def step(self, *arguments, **options):
        logits, past = self._engine.step(*arguments, **options)
        self.logits.append(logits[0])
        return logits, past

    def recorded(self):
        logits, self.logits = np.concatenate(self.logits), []
        return logits


def assert_same_memory(content: bytes, expected, tolerance: float) -> None:
    memory = memory_from_bytes(content, "what the library saved")
    assert memory.adapter == expected.adapter and memory.shape == expected.shape
    for name, tensor in memory.tensors().items():
        np.testing.assert_allclose(tensor, expected.tensors()[name], rtol=0, atol=tolerance)


def assert_same_turn(result, answer, engine, conversation, tolerance=TOLERANCE) -> None:
    assert tuple(result["tokens"]) == answer.tokens
    assert (result["text"], result["why"]) == (answer.text, answer.why)
    assert "".join(result["pieces"]) == answer.text
    logits = engine.recorded()
    assert len(result["logits"]) == len(logits)
    np.testing.assert_allclose(result["logits"], logits, rtol=0, atol=tolerance)
    assert_same_memory(result["memory"], conversation.memory, TOLERANCE)
    assert result["messages"] == conversation.messages
    context = conversation.context
    assert result["context"] == {name: getattr(context, name) for name in ("tokens", "window", "messages", "dropped")}


MECHANISMS = {
    "web": {},  # several states in a layer: MSW
    "web_tsw": {"state_heads": 1},
    "web_messages": {"granularity": "message", "couple_lambda": False},
    "web_sentences": {"granularity": "sentence"},
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_conversations_are_pytorchs(exported_with, scripts, name):
    """Covers prompts with a system message, answers that end by themselves or by length, and an earlier memory."""
    exported = exported_with(name, MECHANISMS[name], target="web")
    engine = Recorded(TorchModel(exported.model, exported.tokenizer))
    earlier = Conversation(engine)
    earlier.generate("Before all that.", Sampling(4))
    before = earlier.memory
    engine.recorded()
    conversation = Conversation(engine, before)
    says = [SYSTEM, *TURNS[1:]]
    results = talk(
        scripts,
        exported.folder,
        [{"say": say, "sampling": {"maxNewTokens": 12}} for say in says],
        memory=text_of(memory_bytes(before)),
    )
    for say, result in zip(says, results, strict=True):
        assert_same_turn(result, conversation.generate(say, Sampling(12)), engine, conversation)


@pytest.mark.parametrize("unpacked", [False, True])
def test_conversations_in_int4_are_those_of_onnx_runtime(exported_with, scripts, unpacked, tmp_path):
    """Covers the exported graph, and the graph of a page, whose weights become float32 when it is loaded."""
    exported = exported_with("web_int4", {}, target="web", quantize="int4")
    options = {}
    if unpacked:
        assert write_unpacked(exported.folder / MODEL_FILE, tmp_path / "unpacked.onnx")
        options["graph"] = str(tmp_path / "unpacked.onnx")
    engine = Recorded(OnnxModel(exported.folder, threads=1))
    conversation = Conversation(engine)
    results = talk(
        scripts, exported.folder, [{"say": say, "sampling": {"maxNewTokens": 3}} for say in TURNS], **options
    )
    for say, result in zip(TURNS, results, strict=True):
        assert_same_turn(result, conversation.generate(say, Sampling(3)), engine, conversation, INT4_TOLERANCE)


def test_a_hybrids_conversations_are_pytorchs(scripts, tmp_path):
    """Convolutions and recurrent states of the base continue from turn to turn, and are restored by undo."""
    tokenizer = tiny_tokenizer()
    model = hybrid("qwen3_5_text", tokenizer)
    export_onnx(model, tokenizer, tmp_path / "onnx", target="web")
    layers = Manifest.read(tmp_path / "onnx").interface.layers
    assert any(layer.convolutions for layer in layers) and any(layer.recurrent for layer in layers)
    engine = Recorded(TorchModel(model, tokenizer))
    conversation = Conversation(engine)
    steps = [("my cat is Bella", {}), ("no", {}), "undo", ("what is the name of my cat?", {})]
    for step, result in zip(steps, talk(scripts, tmp_path / "onnx", list(map(action_of, steps))), strict=True):
        assert result["unreleased"] == 0, "tensors that nothing needs any more"
        if step == "undo":
            assert conversation.undo() and result["undone"]
            assert_same_memory(result["memory"], conversation.memory, TOLERANCE)
        else:
            assert_same_turn(result, conversation.generate(step[0], Sampling(8)), engine, conversation)


SAMPLED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 5}
WINDOW = 170  # the first two turns fit


def test_a_window_undo_and_sampling_are_pytorchs(exported_with, scripts):
    exported = exported_with("web", {}, target="web")
    engine = Recorded(TorchModel(exported.model, exported.tokenizer))
    conversation = Conversation(engine, window=WINDOW)
    turns = ((TURNS[0], {}), (TURNS[1], SAMPLED), (TURNS[2], {"stop": ("a", "e", "\x02")}), (TURNS[2], SAMPLED))
    steps = [*turns, "undo", "undo", "undo", turns[2], "forget", turns[1]]
    dropped = []
    for step, result in zip(
        steps, talk(scripts, exported.folder, list(map(action_of, steps)), window=WINDOW), strict=True
    ):
        if isinstance(step, str):
            done = getattr(conversation, step)()
            assert step == "forget" or result["undone"] is done is True
            assert_same_memory(result["memory"], conversation.memory, TOLERANCE)
            assert result["messages"] == conversation.messages
        else:
            words, options = step
            assert_same_turn(result, conversation.generate(words, Sampling(8, **options)), engine, conversation)
        assert result["unreleased"] == 0, "tensors that nothing needs any more"
        dropped.append(conversation.context.dropped)
    assert max(dropped) > 0 == min(dropped)


def test_a_replaced_memory_leaves_no_tensors(exported_with, scripts):
    exported = exported_with("web", {}, target="web")
    conversation = Conversation(TorchModel(exported.model, exported.tokenizer))
    actions = [action_of((TURNS[0], {})), {"load": text_of(memory_bytes(conversation.memory))}]
    actions += [action_of((TURNS[1], {})), {"undo": True}, {"undo": True}]
    assert [result["unreleased"] for result in talk(scripts, exported.folder, actions)] == [0] * len(actions)


def action_of(step):
    if isinstance(step, str):
        return {step: True}
    words, options = step
    return {"say": words, "sampling": {"maxNewTokens": 8, **in_javascript(options)}}
