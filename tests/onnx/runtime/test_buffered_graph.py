"""Keys and values written in place, in buffers of a fixed or growing length, and how pasts share them."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from helpers.buffered_calls import called, content, fed, same
from memory.test_static_cache import model_of

from deltamem_tool.chat.conversation import Conversation, Sampling, generate_together
from deltamem_tool.chat.torch_engine import TorchModel
from deltamem_tool.errors import ConfigError, ExportError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.export.export import TOLERANCE
from deltamem_tool.onnx.export.interface import interface_of
from deltamem_tool.onnx.export.targets import TARGETS
from deltamem_tool.onnx.runtime.buffered_graph import open_graph
from deltamem_tool.onnx.runtime.engine import OnnxModel
from deltamem_tool.onnx.runtime.ortvalue import to_numpy

SHORT = Sampling(max_new_tokens=6)
# The same sums in another order, for logits and states of order 10.
CLOSE = 2e-4


@pytest.fixture(scope="module")
def model(static_export):
    return OnnxModel(static_export.folder)


@pytest.fixture(params=["fixed", "fixed_columns", "growing"])
def graph(request, model, exported_with):
    """Packed keys and values of a fixed length, without and with padding in their columns, and growing ones."""
    if request.param == "fixed":
        return model.graph
    if request.param == "growing":
        return request.getfixturevalue("packed")
    columns = exported_with("fixed_columns", {}, target="portable", max_length=112)
    assert not columns.manifest.interface.packed
    return OnnxModel(columns.folder).graph


@pytest.fixture
def bindings(monkeypatch):
    """For each call of ONNX Runtime: the addresses of the keys read and written, and whether its binding is new."""
    addresses = []
    of_binding: dict[int, dict[str, int]] = {}

    def watch(method):
        own = getattr(onnxruntime.IOBinding, method)

        def bind(self, name, value):
            of_binding.setdefault(id(self), {})[name] = value.data_ptr()
            own(self, name, value)

        monkeypatch.setattr(onnxruntime.IOBinding, method, bind)

    watch("bind_ortvalue_input"), watch("bind_ortvalue_output")
    run = onnxruntime.InferenceSession.run_with_iobinding

    def run_and_note(self, binding, options=None):
        addresses.append(of_binding.get(id(binding)))
        run(self, binding, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", run_and_note)
    return addresses


def test_the_graph_reports_its_length(static_export, model):
    interface = static_export.manifest.interface
    assert interface.max_length == static_export.manifest.interface.max_length == model.max_length
    assert static_export.manifest.max_abs_diff <= TOLERANCE
    key = contract.carried_name(contract.PAST, 0, contract.KEY)
    assert interface.inputs()[key] == interface.outputs()["present.0.key"]
    assert interface.inputs()[key][1] == (contract.BATCH, 2, static_export.manifest.interface.max_length, 16)
    assert interface.inputs()[contract.PAST_LENGTH] == (contract.INT64, (1,))


def test_a_conversation_matches_pytorch(static_export, model):
    """Covers turns, an undone one, and a different one after it."""
    talks = [
        Conversation(model),
        Conversation(
            TorchModel(static_export.model, static_export.tokenizer), window=static_export.manifest.interface.max_length
        ),
    ]
    for content_, undone in (("hi", False), ("a b", True), ("xyz", False), ("so", False)):
        answers = [talk.generate(content_, SHORT) for talk in talks]
        assert answers[0].tokens == answers[1].tokens
        if undone:
            assert all(talk.undo() for talk in talks)
        for layer, state in talks[1].memory.states.items():
            np.testing.assert_allclose(talks[0].memory.states[layer], state, atol=CLOSE)
    assert talks[0].context == talks[1].context


def test_conversations_of_different_lengths_answer_together(model):
    first = [Conversation(model) for _ in range(3)]
    alone = [Conversation(model) for _ in range(3)]
    for contents in (["hi", "abcdef", "k"], ["ab", "c", "defg"]):
        together = generate_together(first, contents, SHORT)
        assert [answer.tokens for answer in together] == [
            talk.generate(text, SHORT).tokens for talk, text in zip(alone, contents, strict=True)
        ]
    for one, other in zip(first, alone, strict=True):
        np.testing.assert_allclose(one.memory.states[0], other.memory.states[0], atol=CLOSE)


def test_keys_and_values_are_not_copied(static_export, bindings):
    """Every call reads and writes the same buffers. Single tokens alternate between two bindings."""
    graph = open_graph(static_export.folder, static_export.manifest.interface)
    _, past = called(graph, [[65, 66, 67]], graph.empty_past(1))
    fed(graph, range(68, 74), past)
    key, out = contract.carried_name(contract.PAST, 0, contract.KEY), "present.0.key"
    buffer = past.lease.buffers.cache[key].data_ptr()
    assert {call[name] for call in bindings for name in (key, out)} == {buffer}
    steps = bindings[1:]
    assert steps[0] is not steps[1] and all(call is steps[n % 2] for n, call in enumerate(steps))
    state = contract.carried_name(contract.PAST, 0, contract.STATE)
    assert steps[0][state] == steps[1]["present.0.recurrent_state"] != steps[1][state]


def test_repeating_a_step_gives_the_same_result(graph):
    """Recording a CUDA graph repeats a step, so a step must not change its own inputs."""
    _, past = called(graph, [[65, 66, 67]], graph.empty_past(1))
    _, past = fed(graph, [68, 69], past)
    buffers, source = past.lease.buffers, next(n for n, t in enumerate(past.lease.buffers.owners) if t() is past)
    _, after = called(graph, [[70]], past)
    before = content(graph, after)
    graph._session.run_with_iobinding(buffers.bindings[source])
    same(content(graph, after), before)


def test_continuing_from_a_past_does_not_change_it(graph):
    """Its buffers are changed, but another call from it uses a copy."""
    _, past = called(graph, [[65, 66, 67]], graph.empty_past(1))
    _, past = fed(graph, [68, 69], past)
    before = content(graph, past)
    first, one = fed(graph, [70, 71, 72, 73], past)
    expected = content(graph, one)
    second, other = fed(graph, [80, 81], past)
    again, twin = fed(graph, [70, 71, 72, 73], past)
    same(content(graph, past), before)
    same(content(graph, one), expected)
    same(content(graph, twin), expected)
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    assert one.lease is past.lease and other.lease is not past.lease


def test_pasts_of_every_step_stay_valid(graph):
    """Memories in the two slots are copied before they are overwritten."""
    _, past = called(graph, [[65, 66]], graph.empty_past(1))
    pasts = [past]
    contents = [content(graph, past)]
    for token in range(70, 76):
        pasts.append(called(graph, [[token]], pasts[-1])[1])
        contents.append(content(graph, pasts[-1]))
    for past, expected in zip(pasts, contents, strict=True):
        same(content(graph, past), expected)


def test_truncating_a_past_makes_no_copy(graph):
    _, past = called(graph, [[65, 66, 67, 68]], graph.empty_past(1))
    cut = graph.take(past, 0, np.arange(3))
    assert cut.lease is past.lease and cut.length == 3
    _, expected = called(graph, [[65, 66, 67]], graph.empty_past(1))
    expected = graph.with_memory(expected, graph.states(past), {})
    actual, _ = called(graph, [[90]], cut)
    logits, _ = called(graph, [[90]], expected)
    np.testing.assert_allclose(actual, logits, atol=CLOSE)
    assert to_numpy(past.lease.buffers.cache["past_key_values.0.key"])[:, :, 3].any()
    moved = graph.take(past, 0, np.array([1, 3]))
    assert moved.lease is not past.lease
    key = "past_key_values.0.key"
    whole = content(graph, past)[key]
    assert np.array_equal(content(graph, moved)[key], whole[:, :, [1, 3]])


def test_buffers_are_reused(model):
    graph = model.graph
    gc.collect()
    _, past = called(graph, [[65, 66]], graph.empty_past(1))
    _, past = fed(graph, [67, 68], past)
    logits, buffers = fed(graph, [69], past)[0], past.lease.buffers
    del past
    past = graph.empty_past(1)
    assert past.lease.buffers is buffers
    _, past = called(graph, [[65, 66]], past)  # with values of the last conversation behind these columns
    assert np.array_equal(fed(graph, [67, 68, 69], past)[0], logits)


def test_buffers_with_nan_are_not_reused(model):
    graph = model.graph
    nan = {0: np.full((1, 2, 4, 4), np.nan, np.float32)}
    _, past = called(graph, [[65, 66]], graph.empty_past(1, nan))
    buffers = past.lease.buffers
    del past
    assert graph.empty_past(1).lease.buffers is not buffers


def test_a_long_prompt_is_fed_in_pieces(graph, monkeypatch, bindings):
    tokens = [list(range(65, 76))]
    whole, past = called(graph, tokens, graph.empty_past(1))
    monkeypatch.setattr("deltamem_tool.onnx.runtime.buffered_graph.LONGEST_CALL", 4)
    bindings.clear()
    pieces, other = called(graph, tokens, graph.empty_past(1))
    assert len(bindings) == 3
    np.testing.assert_allclose(pieces, whole, atol=CLOSE)
    np.testing.assert_allclose(graph.states(other)[0], graph.states(past)[0], atol=CLOSE)


def test_threads_can_continue_from_one_past(graph):
    _, past = called(graph, [[65, 66, 67]], graph.empty_past(1))
    expected = {start: fed(graph, range(start, start + 8), past)[0] for start in (70, 90, 110)}
    results = {}
    threads = [
        threading.Thread(
            target=lambda start=start: results.update({start: fed(graph, range(start, start + 8), past)[0]})
        )
        for start in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(results, expected)


def test_a_conversation_that_outgrows_the_buffers_raises(static_export, model, bindings):
    graph, room = model.graph, static_export.manifest.interface.max_length
    _, past = called(graph, [[65] * (room - 1)], graph.empty_past(1))
    _, past = called(graph, [[66]], past)
    before = content(graph, past)
    bindings.clear()
    with pytest.raises(ExportError, match=f"room for {room} tokens, and {room + 1} are needed"):
        called(graph, [[67]], past)
    assert not bindings
    same(content(graph, past), before)
    with pytest.raises(ConfigError, match=f"window of {room + 1} tokens is too large"):
        Conversation(model, window=room + 1)
    talk = Conversation(model)
    assert talk.window == room
    with pytest.raises(ConfigError, match="longer than the window"):
        talk.generate("x" * room, SHORT)


def test_cuda_graphs_need_cuda_and_a_fixed_length(static_export):
    with pytest.raises(ExportError, match="CUDA graph") as caught:
        OnnxModel(static_export.folder, cuda_graph=True)
    assert "provider is cpu" in caught.value.why
    with pytest.raises(ExportError, match="CUDA graph") as caught:
        open_graph(
            static_export.folder, replace(static_export.manifest.interface, max_length=0), "cuda", cuda_graph=True
        )
    assert "--max-length" in caught.value.next


def test_run_options_for_cuda_graphs(static_export, monkeypatch):
    """Steps are recorded under an id of their binding's own, other calls never; and one thread makes them all. The
    session itself is on the CPU here."""
    session, requests = onnxruntime.InferenceSession, []

    def on_cpu(path, options, providers):
        requests.extend(providers)
        return session(path, options, providers=[providers[-1]])

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("deltamem_tool.onnx.runtime.graph.execution_providers", lambda name: names)
    monkeypatch.setattr("deltamem_tool.onnx.runtime.graph.check_provider", lambda name, found: None)
    graph = open_graph(static_export.folder, static_export.manifest.interface, "cuda", cuda_graph=True)
    graph.device = "cpu"
    assert requests == [("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": "1"}), "CPUExecutionProvider"]
    ids = []
    run = session.run_with_iobinding

    def noted(self, binding, options=None):
        ids.append((options.get_run_config_entry("gpu_graph_id"), id(binding)))
        run(self, binding, options)

    monkeypatch.setattr(session, "run_with_iobinding", noted)
    _, past = called(graph, [[65, 66, 67]], graph.empty_past(1))
    _, other = called(graph, [[65, 66, 67]], graph.empty_past(1))
    fed(graph, [68, 69, 70], past), fed(graph, [68, 69, 70], other)
    assert [name for name, _ in ids[:2]] == ["-1", "-1"]
    steps = ids[2:]
    assert [name for name, _ in steps] == ["1", "2", "1", "3", "4", "3"]
    assert len(set(steps)) == 4
    caught = []

    def elsewhere():
        try:
            called(graph, [[71]], past)
        except ExportError as error:
            caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start(), thread.join()
    assert "one thread" in caught[0].why


def test_a_sliding_window_raises_where_attention_has_none():
    model = model_of("sliding")
    with pytest.raises(ExportError, match="fixed length") as caught:
        interface_of(model, adapter_of(model), CallOptions(model, "last"), "last", TARGETS["portable"], 64)
    assert "StaticSlidingWindowLayer" in caught.value.why
    model = model_of("qwen3")
    with pytest.raises(ExportError, match="maximum length of 63 tokens is too short"):
        interface_of(model, adapter_of(model), CallOptions(model, "last"), "last", TARGETS["cpu"], 63)
    with pytest.raises(ExportError, match="genai does not support --max-length"):
        interface_of(model, adapter_of(model), CallOptions(model, "last"), "last", TARGETS["genai"], 64)
