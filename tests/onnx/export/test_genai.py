"""Folders for onnxruntime-genai, run by that package and compared with PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from base_model.tiny_configs import tiny_config
from click.testing import CliRunner
from helpers.tiny import randomise, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from deltamem_tool import attach
from deltamem_tool.chat.text import ChatText
from deltamem_tool.cli.export import command
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import ConfigError, DeltaMemError, ExportError, MemoryStateError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.onnx.contract import Layer
from deltamem_tool.onnx.export import export, genai, trace
from deltamem_tool.onnx.export.targets import INT4, INT8
from deltamem_tool.onnx.manifest import Manifest
from deltamem_tool.onnx.runtime.buffered_graph import open_graph
from deltamem_tool.onnx.runtime.engine import OnnxModel

TOLERANCE = 1e-4
CONTEXT = 120
NEW_TOKENS = 25
QUESTIONS = ("My cat is called Zoë 🐈.", "What is she called?")
# Line ends and indentation that transformers strips and other engines keep.
TEMPLATE = """{# Written
 to be read. #}
{% for message in messages %}
    {% if message.role == 'user' %}
<|user|>{{ message.content | trim }}
    {%- else %}
<|assistant|>{{ message.content }}
    {%- endif %}
<|end|>

{% endfor %}
{%- if add_generation_prompt %}
<|assistant|>
{%- endif %}
"""
DOCS = Path(__file__).parents[3] / "docs" / "export.md"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    """Two layers, with a memory only in the second; answers to the first question end after some tokens."""
    model = tiny_model("qwen3", vocab_size=len(tokenizer), max_position_embeddings=CONTEXT)
    randomise(attach(model, DeltaMemConfig(rank=4, state_heads=2, branches=("q", "v", "o"), layers=(1,))))
    answer, _ = in_pytorch(model, chat_ids(tokenizer, QUESTIONS[0]), NEW_TOKENS)
    stop = next(token for token in answer[4:] if token not in answer[:4])
    model.generation_config.eos_token_id = [stop]
    return model


@pytest.fixture(scope="module")
def start(model, tokenizer, tmp_path_factory):
    """A memory file and its memory."""
    _, memory = in_pytorch(model, tokenizer("What was said the day before.").input_ids, 1)
    path = tmp_path_factory.mktemp("memory") / "before.safetensors"
    memory.save(path)
    return path, memory


@pytest.fixture(scope="module")
def export_again(model, tokenizer, start, tmp_path_factory):
    """`export_onnx` with one trace for all calls. Everything after the trace is done each time."""
    with pytest.MonkeyPatch.context() as patch:
        trace, traced = export.trace_model, tmp_path_factory.mktemp("traced") / "model.onnx"

        def once(*args):
            if not traced.is_file():
                onnx_ir.save(trace(*args), traced)
            return onnx_ir.load(traced)

        patch.setattr(export, "trace_model", once)
        yield lambda out, **options: export.export_onnx(model, tokenizer, out, target="genai", **options)


@pytest.fixture(scope="module")
def folder(export_again, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("genai") / "exported"
    export_again(out)
    return out


@pytest.fixture(scope="module")
def folder_with_memory(export_again, start, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("genai") / "with_memory"
    export_again(out, memory=start[0])
    return out


def chat_ids(tokenizer, question: str) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )


def in_pytorch(model, ids: list[int], new_tokens: int, memory: MemoryState | None = None):
    """Greedy tokens of `generate`, up to a stop token or a maximum, and the memory after them."""
    cache = MemoryCache(model, memory)
    stop = model.generation_config.eos_token_id
    prompt = torch.tensor([ids])
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        cache=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=stop if isinstance(stop, list) else None,  # a list: the fixture has chosen it
    )
    return tokens[0, len(ids) :].tolist(), cache.memory


def in_genai(folder: Path, ids, new_tokens: int, adapter: Path | None = None, **search):
    """Sequences after the prompt, by row, and a function that reads a layer's state."""
    model = onnxruntime_genai.Model(str(folder))
    ids = np.atleast_2d(np.array(ids, np.int32))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=ids.shape[1] + new_tokens, batch_size=len(ids), **search)
    generator = onnxruntime_genai.Generator(model, params)
    if adapter is not None:
        adapters = onnxruntime_genai.Adapters(model)
        adapters.load(str(adapter), "memory")
        generator.set_active_adapter(adapters, "memory")
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    answers = [generator.get_sequence(row)[ids.shape[1] :].tolist() for row in range(len(ids))]
    return answers, generator.get_output("present.1.recurrent_state")


def without_stop(model, tokens: list[int]) -> list[int]:
    """The tokens without stop tokens, which onnxruntime-genai leaves out."""
    return [token for token in tokens if token not in model.generation_config.eos_token_id]


def assert_state(actual: np.ndarray, memory: MemoryState) -> None:
    torch.testing.assert_close(torch.from_numpy(actual), memory.layers[1], rtol=0, atol=TOLERANCE)


@pytest.fixture
def long_prompt(model, tokenizer) -> list[int]:
    """A prompt whose answer does not stop."""
    for text in ("Remember the blue door.", "My dog is Bella.", "A long day it was.", "Tell me more about it, please."):
        ids = tokenizer(text).input_ids
        if len(in_pytorch(model, ids, NEW_TOKENS)[0]) == NEW_TOKENS:
            return ids
    raise AssertionError("every answer stops")


def test_greedy_tokens_and_states_match_pytorch(model, folder, long_prompt):
    (tokens,), state = in_genai(folder, long_prompt, NEW_TOKENS)
    expected, memory = in_pytorch(model, long_prompt, NEW_TOKENS)
    assert tokens == expected and len(tokens) == NEW_TOKENS
    assert_state(state, memory)


@pytest.mark.parametrize("quantize", [INT8, INT4])
def test_a_quantised_folder_matches_onnx_runtime(quantize, model, export_again, long_prompt, tmp_path):
    """The package chooses the tokens that ONNX Runtime chooses, which are close to those of PyTorch."""
    manifest = export_again(tmp_path / "out", quantize=quantize, group_size=16)
    nodes = {node.op_type for node in onnx_ir.load(tmp_path / "out" / "model.onnx").graph}
    assert {"MatMulNBits", "GatherBlockQuantized"} <= nodes
    (tokens,), state = in_genai(tmp_path / "out", long_prompt, NEW_TOKENS)
    graph = open_graph(tmp_path / "out", manifest.interface)
    past, ids, expected = graph.empty_past(1), np.array([long_prompt]), []
    for length in range(len(long_prompt), len(long_prompt) + NEW_TOKENS):
        mask, write = np.ones((1, length), np.int64), np.ones(ids.shape, bool)
        logits, past = graph.step(ids, mask, write, past)
        ids = logits[:, -1].argmax(-1, keepdims=True)
        expected.append(int(ids[0, 0]))
    assert tokens == expected[: len(tokens)] and len(tokens) > 4
    if len(tokens) == NEW_TOKENS:
        np.testing.assert_allclose(state, graph.states(past)[1], rtol=0, atol=TOLERANCE)
    assert np.abs(state - in_pytorch(model, long_prompt, NEW_TOKENS)[1].layers[1].numpy()).max() > TOLERANCE


@pytest.mark.slow
def test_layers_of_different_shapes_match_pytorch(tokenizer, monkeypatch, tmp_path):
    """Gemma 4 has keys of two widths, and layers that use the keys of others."""
    monkeypatch.setattr(export, "trace_model", trace.trace_model)  # not the shared trace
    torch.manual_seed(0)
    config = tiny_config("gemma4_text")
    config.vocab_size = config.vocab_size_per_layer_input = len(tokenizer)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(attach(model, DeltaMemConfig(rank=4, branches=("q", "o"))))
    manifest = export.export_onnx(model, tokenizer, tmp_path / "out", target="genai")
    assert {layer.key for layer in manifest.interface.layers} == {(2, 8), (2, 16), None}
    prompt = list(range(5, 17))
    (tokens,), state = in_genai(tmp_path / "out", prompt, NEW_TOKENS)
    expected, memory = in_pytorch(model, prompt, NEW_TOKENS)
    assert tokens == expected
    assert_state(state, memory)


def test_our_runtime_rejects_the_folder(folder):
    with pytest.raises(ExportError, match="for onnxruntime-genai"):
        OnnxModel(folder)


@pytest.mark.parametrize("way", ["default", "adapter file"])
def test_a_folder_can_start_from_a_memory_file(model, folder, folder_with_memory, start, long_prompt, tmp_path, way):
    path, memory = start
    adapter = None
    if way == "adapter file":
        adapter = tmp_path / "before.onnx_adapter"
        genai.write_adapter_file(folder, path, adapter)
    (tokens,), state = in_genai(folder if adapter else folder_with_memory, long_prompt, NEW_TOKENS, adapter)
    expected, after = in_pytorch(model, long_prompt, NEW_TOKENS, memory)
    assert tokens == without_stop(model, expected)
    assert_state(state, after)
    assert tokens != in_genai(folder, long_prompt, NEW_TOKENS)[0][0]  # the memory has an effect


def test_a_batch_of_different_prompts_matches_each_alone(model, tokenizer, folder_with_memory, start):
    """onnxruntime-genai pads the rows. Each starts from the memory, and gives what it gives alone."""
    texts = ["Remember the blue door, it is old.", "My dog is Bella."]
    ids = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder_with_memory))).encode_batch(texts).as_numpy()
    assert ids.shape[0] == 2 and (ids == tokenizer.pad_token_id).any()
    answers, states = in_genai(folder_with_memory, ids, 3)
    for row, text in enumerate(texts):
        expected, memory = in_pytorch(model, tokenizer(text).input_ids, 3, start[1])
        assert len(expected) == 3, "a row that ends earlier is fed padding"
        assert answers[row] == expected
        assert_state(states[row : row + 1], memory)


def chat(folder: Path, memory: Path, questions) -> str:
    """Run the docs' program with `questions` as its input, and return its output."""
    program = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[-1]
    assert len(program.splitlines()) < 30 and "deltamem_tool" not in program
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(memory)],
        input="\n".join(questions) + "\n",
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_program_of_the_docs_chats_and_remembers(model, tokenizer, folder, tmp_path):
    file = tmp_path / "memory.onnx_adapter"
    memory = None
    theirs = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder)))  # it ends a text at a zero byte
    for questions in (QUESTIONS, QUESTIONS[:1]):  # the second time with the memory of the first, and an empty context
        output = chat(folder, file, questions)
        ids, messages, printed, before = [], [], "", memory
        for question in questions:
            messages.append({"role": "user", "content": question})
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids += tokenizer(text.rpartition("(answer)")[2]).input_ids
            answer, memory = in_pytorch(model, ids, CONTEXT - len(ids), before)
            messages.append({"role": "assistant", "content": "(answer)"})
            ids += without_stop(model, answer)
            printed += theirs.decode(np.array(without_stop(model, answer), np.int32)) + "\n"
        assert output == printed
        saved = onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()
        assert list(saved) == ["initial.1.recurrent_state"]
        assert_state(saved["initial.1.recurrent_state"].numpy(), memory)


def test_the_chat_template_renders_as_in_transformers(tokenizer, folder):
    messages = [
        {"role": "user", "content": " Hi\n there  "},
        {"role": "assistant", "content": 'A "quoted" \\ line\n'},
        {"role": "user", "content": "2"},
    ]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    theirs = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder)))
    assert theirs.apply_chat_template(json.dumps(messages), add_generation_prompt=True) == expected
    as_it_was = theirs.apply_chat_template(json.dumps(messages), template_str=TEMPLATE, add_generation_prompt=True)
    assert as_it_was != expected  # or the exported template would need no change
    assert ChatText.from_folder(folder).render(messages) == expected


def test_raw_blocks_and_comments_of_a_template_are_converted():
    assert genai.with_explicit_whitespace("{# no #}\n{% raw %}{{ x }}{% endraw %}\n\n{{ y -}}  \n z") == (
        '{{ "{{ x }}" }}{{ "\\n" }}{{ y -}}{{ "z" }}'
    )


def test_the_folder_holds_the_expected_files(model, tokenizer, folder):
    content = json.loads((folder / "genai_config.json").read_text())
    assert content["model"]["context_length"] == content["search"]["max_length"] == CONTEXT
    ends = model.generation_config.eos_token_id  # and the template's text after an answer
    assert content["model"]["eos_token_id"] == [*ends, tokenizer.convert_tokens_to_ids("<|end|>")]
    assert content["model"]["pad_token_id"] == tokenizer.pad_token_id
    assert content["search"]["past_present_share_buffer"] is True
    assert Manifest.from_json((folder / "deltamem_onnx.json").read_text()).interface.genai
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert {value.name: value.shape for value in session.get_inputs()}.items() >= {
        "past_key_values.1.recurrent_state": ["batch_size", 2, 4, 4],
        "past_key_values.1.conv_state": ["batch_size", 1, 1],
    }.items()
    assert "write_mask" not in {value.name for value in session.get_inputs()}
    assert [value.name for value in session.get_overridable_initializers()] == ["initial.1.recurrent_state"]


def test_a_graph_without_the_initial_memory_raises_and_leaves_nothing(export_again, start, monkeypatch, tmp_path):
    set_defaults = genai.set_defaults
    monkeypatch.setattr(genai, "set_defaults", lambda program, interface, start: set_defaults(program, interface, None))
    with pytest.raises(ExportError, match="does not compute what PyTorch computes"):
        export_again(tmp_path / "out", memory=start[0])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def untraced(monkeypatch):
    def traced(*args):
        raise AssertionError("it was traced")

    monkeypatch.setattr(export, "trace_model", traced)


def other_memories(start: MemoryState, adapter: str) -> dict[str, MemoryState]:
    state = start.layers[1]
    return {
        "another adapter": MemoryState({1: state}, "0" * 64),
        "layers are": MemoryState({0: state}, adapter),
        "state heads 1": MemoryState({1: state[:, :1]}, adapter),
        "2 rows": start.fork(2),
    }


@pytest.mark.parametrize("why", ["another adapter", "layers are", "state heads 1", "2 rows"])
def test_a_memory_that_does_not_fit_raises_before_tracing(model, tokenizer, folder, start, untraced, tmp_path, why):
    path = tmp_path / "memory.safetensors"
    other_memories(start[1], adapter_of(model).fingerprint)[why].save(path)
    with pytest.raises(MemoryStateError, match=why):
        export.export_onnx(model, tokenizer, tmp_path / "out", target="genai", memory=path)
    with pytest.raises(MemoryStateError, match=why):
        genai.write_adapter_file(folder, path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_a_memory_option_for_other_targets_raises(model, tokenizer, start, untraced, tmp_path):
    with pytest.raises(ConfigError, match="takes the state as an input"):
        export.export_onnx(model, tokenizer, tmp_path / "out", memory=start[0])
    result = CliRunner().invoke(command, ["adapter", "--out", str(tmp_path / "out"), "--memory", str(start[0])])
    assert result.exit_code == 2 and "--memory is for the target genai" in result.output
    assert list(tmp_path.iterdir()) == []


def refused(model, tokenizer, out: Path, match: str) -> None:
    with pytest.raises(DeltaMemError, match=match):
        export.export_onnx(model, tokenizer, out, target="genai")
    assert not out.exists()


def test_models_unsupported_by_onnxruntime_genai_raise_early(model, tokenizer, untraced, tmp_path, monkeypatch):
    by_messages = tiny_model("qwen3", vocab_size=len(tokenizer))
    attach(by_messages, DeltaMemConfig(granularity="message"))
    refused(by_messages, tokenizer, tmp_path / "out", "writes by messages")
    interface_of = export.interface_of

    def uneven(*args):
        interface = interface_of(*args)
        return dataclasses.replace(interface, layers=(Layer((2, 16), (2, 8), None), *interface.layers[1:]))

    monkeypatch.setattr(export, "interface_of", uneven)
    refused(model, tokenizer, tmp_path / "out", "one shape")
    monkeypatch.setattr(export, "interface_of", interface_of)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "max_position_embeddings", 0)
        refused(model, tokenizer, tmp_path / "out", "the length of its context")
    with monkeypatch.context() as patch:
        for holder in (model.config, model.generation_config):
            patch.setattr(holder, "eos_token_id", None)
        endless = copy.deepcopy(tokenizer)
        endless.eos_token = endless.chat_template = None
        refused(model, endless, tmp_path / "out", "the token that ends an answer")
