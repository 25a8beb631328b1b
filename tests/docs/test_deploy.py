"""docs/deploy.md: its table matches the contract, its program is the example file, and the examples run."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.ort_headers import ort_include
from tokenizers import Tokenizer

from deltamem_tool.onnx.contract import Interface, Layer
from deltamem_tool.onnx.manifest import Manifest
from deltamem_tool.onnx.runtime.graph import Graph
from deltamem_tool.onnx.signature_table import markdown, rows

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "deploy.md").read_text(encoding="utf-8")
EXAMPLE = DOCS / "examples" / "remember.py"
CPP_EXAMPLE = DOCS / "examples" / "remember.cpp"
MAX_LINES = 40
FACT, QUESTION = "By the way, my dog is Bella.", "What is the name of my dog?"
ANSWER = "Your dog is Bella."
ROUNDING = 1e-4
# Qwen3-4B's sizes, with a state of 8 × 8 that writes by messages.
QWEN = Interface("last", 151_936, "float32", 25, (Layer((8, 128), (8, 128), (1, 8, 8)),) * 36)


def test_the_table_matches_the_contract():
    match = re.search(r"<!-- interface -->\n(.*)<!-- /interface -->", TEXT, re.DOTALL)
    assert match is not None and match[1] == markdown(QWEN)


def test_layers_that_differ_have_rows_of_their_own():
    cached, bare = Layer((8, 128), (8, 128), (1, 8, 8)), Layer(None, None, (1, 8, 8))
    named = [row.name for row in rows(Interface("last", 100, "float16", 0, (cached, bare, cached, cached)))]
    assert named[3:6] == [
        "past_key_values.0.key",
        "past_key_values.{2…3}.key",
        "past_key_values.0.value",
    ]
    assert "past_key_values.{0…3}.recurrent_state" in named


def test_meanings_match_the_graph():
    """Covers graphs whose inputs grow, graphs of a fixed length, and graphs for onnxruntime-genai."""

    def meanings(**changes):
        return {row.name: row.meaning for row in rows(dataclasses.replace(QWEN, **changes))}

    grows, fixed, genai = meanings(logits="all"), meanings(max_length=8192), meanings(genai=True, segment=0)
    key, present = "past_key_values.{0…35}.key", "present.{0…35}.key"
    assert grows["logits"] == "logits of every position" and fixed["logits"] == "logits of the last position"
    assert grows[key] == "attention keys; empty in the first call"
    assert fixed[key] == "attention keys; room for 8,192 tokens, zeros in the first call"
    assert fixed[present] == "attention keys, including those of this call, room for 8,192 tokens"
    assert "unused" in fixed["attention_mask"] and "unused" not in grows["attention_mask"]
    assert fixed["past_length"] == "number of columns of keys and values in use; 0 in the first call"
    assert genai["initial.{0…35}.recurrent_state"] == "memory that new conversations start from"
    for description in (grows, fixed, genai):
        assert all(description.values())
        results = [meaning for name, meaning in description.items() if name.startswith("present")]
        assert not [meaning for meaning in results if "first call" in meaning]


def test_the_program_matches_the_example_and_is_short():
    program = EXAMPLE.read_text(encoding="utf-8")
    assert f"```python\n{program}```\n" in TEXT
    assert len(program.splitlines()) <= MAX_LINES
    assert "deltamem_tool" not in program


def python_answers(folder):
    command = [sys.executable, EXAMPLE, folder, FACT, QUESTION]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_python_example_remembers(quickstart_onnx):
    assert python_answers(quickstart_onnx)[1] == ANSWER


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_cpp_example_answers_like_the_python_one(quickstart_onnx, tmp_path):
    """Compiled with Debian's headers, linked with the library of the package that Python runs."""
    import onnxruntime

    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    soname = tmp_path / "libonnxruntime.so.1"
    soname.symlink_to(library)
    program = tmp_path / "remember"
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-isystem{ort_include()}", CPP_EXAMPLE]
    subprocess.run([*command, soname, f"-Wl,-rpath,{tmp_path}", "-o", program], check=True)
    tokenizer = Tokenizer.from_file(str(quickstart_onnx / "tokenizer.json"))
    prompts = [f"<|user|>{words}<|end|><|assistant|>" for words in (FACT, QUESTION)]
    ids = [" ".join(map(str, tokenizer.encode(prompt, add_special_tokens=False).ids)) for prompt in prompts]
    command = [program, quickstart_onnx, str(tokenizer.token_to_id("<|end|>")), *ids]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    answers = [tokenizer.decode([int(token) for token in line.split()]) for line in lines]
    assert answers == python_answers(quickstart_onnx) and answers[1] == ANSWER


def test_the_program_with_one_buffer_matches_a_growing_past(quickstart_onnx, monkeypatch, tmp_path):
    interface = Manifest.read(quickstart_onnx).interface
    assert interface.packed
    (tmp_path / "onnx").symlink_to(quickstart_onnx)
    monkeypatch.chdir(tmp_path)
    program = re.search(r"## In one buffer.*?```python\n(.*?)```", TEXT, re.DOTALL)
    assert program is not None
    names: dict[str, Any] = {}
    exec(program[1], names)
    past = names["past"]
    buffers = {name: value.data_ptr() for name, value in past.items() if name.endswith((".key", ".value"))}
    tokens = list(range(20, 40))
    growing = Graph(quickstart_onnx, interface)
    carried = growing.empty_past(1)
    for start, end in ((0, 7), (7, 8), (8, 20)):
        ids = np.array([tokens[start:end]], np.int64)
        expected, carried = growing.step(ids, np.ones((1, end), np.int64), np.ones(ids.shape, bool), carried)
        np.testing.assert_allclose(names["step"](tokens[start:end], end), expected, atol=ROUNDING)
    assert {name: past[name].data_ptr() for name in buffers} == buffers
    for layer, state in growing.states(carried).items():
        np.testing.assert_allclose(past[f"past_key_values.{layer}.recurrent_state"].numpy(), state, atol=ROUNDING)
