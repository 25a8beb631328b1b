"""Parts of the JavaScript library of `web/`, in Node: files, also untrusted ones, random numbers, sampling, text."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import struct
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from helpers.web_library import LIBRARY, SCRIPTS, in_javascript, in_node, library_folder, text_of
from tokenizers import Tokenizer

import deltamem_tool
from deltamem_tool.chat.sampling import Sampler, Sampling, token_mask
from deltamem_tool.chat.text import ChatText
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.memory.file import StoredMemory, memory_bytes, memory_from_bytes
from deltamem_tool.segments.boundaries import english

pytestmark = pytest.mark.node

DOCS = Path(__file__).parents[3] / "docs"
BACKBONE = Path(deltamem_tool.__file__).parent / "assets" / "backbone"
TOLERANCE = 1e-6  # for a segment's write: float32 in Python, rounded float64 in JavaScript


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """Returns the result of a part of the library for each argument."""
    scripts = library_folder(tmp_path_factory.mktemp("node") / "scripts")
    return lambda name, arguments: in_node(scripts, "parts.mjs", name, input=arguments)


def memory(rows=1, layers=(10, 2, 0), width=0, seed=0):
    random = np.random.default_rng(seed)
    states = {layer: random.standard_normal((rows, 2, 3, 3), np.float32) for layer in sorted(layers)}
    segments = {layer: random.standard_normal((rows, width), np.float32) for layer in states if width}
    for segment in segments.values():
        segment[:, -1] = 4
    return StoredMemory(states, segments, "0" * 64)


def test_it_is_of_this_version_and_needs_what_the_tests_run(part):
    assert part("version", [None]) == [deltamem_tool.__version__]
    package, tested = (json.loads((folder / "package.json").read_text("utf-8")) for folder in (LIBRARY, SCRIPTS))
    assert package["version"] == deltamem_tool.__version__
    assert package["dependencies"].items() <= tested["dependencies"].items()


def test_a_memory_file_is_the_same_bytes_on_both_sides(part):
    odd = memory(layers=(0,))
    odd.states[0][:] = [-0.0, 1e-45, 3.4e38]
    contents = [memory_bytes(each) for each in (memory(), memory(3), memory(width=19), odd)]
    assert part("memory", [{"file": text_of(content)} for content in contents]) == list(map(text_of, contents))


@pytest.mark.parametrize("changes", [{}, {"couple_lambda": False, "gates": "head"}, {"update_rule": "lambda_outside"}])
def test_an_open_segment_is_written_as_in_python(part, changes):
    config = DeltaMemConfig(rank=3, state_heads=2, granularity="message", **changes)
    before = memory(width=config.segment_width)
    mechanism = {"updateRule": config.update_rule, "coupleLambda": config.couple_lambda, "gates": config.gates}
    (written,) = part("memory", [{"file": text_of(memory_bytes(before)), "mechanism": mechanism}])
    after, expected = memory_from_bytes(base64.b64decode(written), "it"), before.end_segment(config)
    for name, tensor in expected.tensors().items():
        np.testing.assert_allclose(after.tensors()[name], tensor, rtol=TOLERANCE, atol=TOLERANCE)


def _header(change):
    content = memory_bytes(memory(layers=(0,)))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


WHOLE = memory_bytes(memory(layers=(0,)))
NAN = memory(layers=(0,)).states[0] * np.nan
DAMAGED = {
    "empty": (b"", "truncated"),
    "cut": (WHOLE[:-4], "truncated"),
    "longer": (WHOLE + b"1234", "longer than its header"),
    "long_header": (struct.pack("<Q", 2**62) + WHOLE[8:], "too large"),
    "not_json": (struct.pack("<Q", 8) + b"nonsense" + WHOLE, "cannot be read"),
    "deep": (struct.pack("<Q", 4000) + b'{"a":' * 666 + b"[]" + b"}" * 666 + b" " * 2, "nested deeper"),
    "nan": (WHOLE[:-72] + NAN.tobytes(), "NaN or infinity"),
    "other_format": (_header(lambda h: h["__metadata__"].update(format="lora")), "does not say that it is"),
    "newer": (_header(lambda h: h["__metadata__"].update(format_version="2")), "is of memory format 2"),
    "no_adapter": (_header(lambda h: h["__metadata__"].pop("adapter")), "no fingerprint"),
    "other_tensor": (_header(lambda h: h.update(x=h.pop("layers.0.state"))), "not a float32 state"),
    "dtype": (_header(lambda h: h["layers.0.state"].update(dtype="I32")), "not a float32 state"),
    "not_square": (_header(lambda h: h["layers.0.state"].update(shape=[1, 2, 1, 9])), "not square"),
    "shape": (_header(lambda h: h["layers.0.state"].update(shape=[1, 2, 3, 4])), "does not match its tensors"),
    "offsets": (_header(lambda h: h["layers.0.state"].update(data_offsets=[-72, 0])), "does not match its tensors"),
}


def test_damaged_memories_are_refused(part):
    results = part("memory", [{"file": text_of(content)} for content, _ in DAMAGED.values()])
    for (name, (_, says)), result in zip(DAMAGED.items(), results, strict=True):
        assert isinstance(result, dict) and result["error"] == "MemoryStateError" and says in result["message"], name


def test_random_numbers_are_numpys(part):
    seeds = (0, 1, 42, 2**32 - 1, 2**32, 2**53 - 1)
    results = part("random", [{"seed": seed, "count": 20} for seed in seeds])
    assert results == [np.random.default_rng(seed).random(20).tolist() for seed in seeds]


SAMPLINGS = (
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.5, "top_k": 7, "seed": 2},
    {"temperature": 1.0, "top_p": 0.8, "seed": 3},
    {"temperature": 2.0, "min_p": 0.05, "seed": 4},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.5, "seed": 5},
    {"temperature": 1e-3, "repetition_penalty": 0.5, "seed": 6},
)


def test_tokens_are_drawn_as_in_python(part):
    logits = np.random.default_rng(0).standard_normal(60).astype(np.float32) * 3
    logits[3] = logits[4] = logits.max()  # a tie
    context, ids, count = [1, 5, 9], [*range(50), 70], 30
    expected = []
    for options in SAMPLINGS:
        sampler = Sampler(Sampling(**options), np.array(context), token_mask(ids))
        expected.append([sampler.pick(logits) for _ in range(count)])
    arguments = [
        {"logits": logits.tolist(), "context": context, "ids": ids, "count": count, "options": in_javascript(options)}
        for options in SAMPLINGS
    ]
    assert part("sampling", arguments) == expected


def test_impossible_samplings_are_refused(part):
    impossible = (
        {"temperature": -1},
        {"topP": 0},
        {"seed": 0.5},
        {"top_k": 3},
        {"stop": [""]},
        {"stop": ["\ud83d"]},
        {"maxNewTokens": 0},
    )
    results = part(
        "sampling", [{"logits": [0], "context": [], "ids": [0], "count": 1, "options": each} for each in impossible]
    )
    assert [result["error"] for result in results] == ["ConfigError"] * len(impossible)


TEXTS = ("My dog is Rex.", "  two  spaces\n\n and lines ", "Zürich 🏔 é", "<|user|>Hi<|end|>\n<|assistant|>", "a\u3000b")
MESSAGES = (
    [{"role": "user", "content": "Hi."}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "{{ x }}"}, {"role": "assistant", "content": ""}],
)


def test_text_is_that_of_python(part):
    folder = BACKBONE
    files = {file.name: text_of(file.read_bytes()) for file in folder.iterdir() if file.suffix in (".json", ".jinja")}
    (result,) = part("text", [{"files": files, "texts": TEXTS, "messages": MESSAGES}])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encodings = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    assert result["ids"] == [encoding.ids for encoding in encodings]
    for text, encoding, offsets in zip(TEXTS, encodings, result["offsets"], strict=True):
        characters = [text.encode("utf-16-le")[2 * start : 2 * end].decode("utf-16-le") for start, end in offsets]
        assert characters == [text[start:end] for start, end in encoding.offsets]
    chat = ChatText.from_folder(folder)
    assert result["rendered"] == [chat.render(messages) for messages in MESSAGES]
    assert set(result["stop"]) == chat.stop_tokens(None)


ODD_WORDS = (
    'Dr. Mr. U.S. e.g. a.m. Ph.D. No. 3.14 $5.50 5% 1. 2) A. Café 你好。 次\uff01 🙂 … ... ?! why? no! "hi" (and.) [1] '
    "• - — ; : www.example.com me@x.org I'm It's \u201cso.\u201d \u2018x\u2019 \u00a0 \u2028 \r\n \n\n \n \t dog is the"
).split(" ")
RANDOM_TEXTS = 2000


def test_sentences_are_those_of_python(part):
    """Covers this repository's documents, and random sequences of words that do not end a sentence or only seem to."""
    random = np.random.default_rng(0)
    texts = [path.read_text("utf-8") for path in sorted(DOCS.glob("*.md"))]
    texts += [" ".join(random.choice(ODD_WORDS, random.integers(1, 40))) for _ in range(RANDOM_TEXTS)]
    assert part("sentences", [texts]) == [[english(text) for text in texts]]


MANIFEST = {
    **{"format": "deltamem-onnx", "format_version": 4, "adapter": "a", "base_model": None, "quantize": "none"},
    "mechanism": {"granularity": "token", "update_rule": "standard", "couple_lambda": True, "gates": "row"},
    "interface": {
        **{"logits": "last", "vocab_size": 8, "dtype": "float32", "segment": 0, "genai": False, "max_length": 0},
        "layers": [{"key": [1, 4], "value": [1, 4], "state": [1, 2, 2]}],
    },
}


def changed(path, value):
    manifest = json.loads(json.dumps(MANIFEST))
    place = functools.reduce(lambda part, name: part[name], path[:-1], manifest)
    place[path[-1]] = value
    return manifest


LAYER = ("interface", "layers", 0)
INVALID = (
    (changed(("format",), "other"), "does not say that its format"),
    (changed(("format_version",), 99), "is of format 99"),
    (changed(("adapter",), ""), "adapter is not valid"),
    (changed((*LAYER, "state"), [1, 2, 3]), "layers.state is not valid"),
    (changed((*LAYER, "state"), [10**6, 2, 2]), "layers.state is not valid"),
    (changed((*LAYER, "key"), None), "layers.value is not valid"),
    (changed(("interface", "layers"), []), "interface.layers is not valid"),
    (changed(("interface", "vocab_size"), 1e30), "vocab_size is not valid"),
    (changed(("interface", "dtype"), "bfloat16"), "dtype is not valid"),
    (changed(("interface", "genai"), True), "for onnxruntime-genai"),
    (changed(("interface", "max_length"), 64), "of a fixed length"),
    (changed(("interface", "segment"), 5), "interface.segment is not valid"),
    (changed(("mechanism", "granularity"), "word"), "granularity is not valid"),
)


def test_folders_of_strangers_are_refused_before_they_run(part):
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    small = {**{name: text_of(b"{}") for name in names}, "model.onnx": text_of(b"no graph"), "model.onnx.data": ""}
    folders = [{**small, "deltamem_onnx.json": text_of(json.dumps(manifest).encode())} for manifest, _ in INVALID]
    sound = {**small, "deltamem_onnx.json": text_of(json.dumps(MANIFEST).encode())}
    tokenizers = {file.name: text_of(file.read_bytes()) for file in BACKBONE.iterdir() if file.suffix == ".json"}
    folders += [small, sound, {**sound, "tokenizer.json": tokenizers["tokenizer.json"]}]
    says = [*(says for _, says in INVALID), "lacks deltamem_onnx.json", "tokenizer.json of this model", "cannot load"]
    results = part("load", [{"files": files} for files in folders])
    for result, why in zip(results, says, strict=True):
        assert result is not None and result["error"] == "ExportError" and why in result["message"]


def test_files_are_fetched_within_limits_and_only_as_expected(part, tmp_path):
    content = bytes(1000)
    (tmp_path / "file").write_bytes(content)
    expected = {"bytes": 1000, "sha256": hashlib.sha256(content).hexdigest()}
    wanted = {"base": "", "name": "file", "limit": 1000, "expected": expected}
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        wanted["base"] = f"http://127.0.0.1:{server.server_port}/"
        arguments = (
            wanted,
            {**wanted, "name": "none"},
            {**wanted, "limit": 999},
            {**wanted, "expected": {**expected, "bytes": 1001}},
            {**wanted, "expected": {**expected, "sha256": "0" * 64}},
        )
        whole, missing, large, cut, other = part("fetch", arguments)
        server.shutdown()
    (unreachable,) = part("fetch", [wanted])
    assert (whole, missing) == (1000, None)
    assert large["error"] == "ExportError" and "more than 999 bytes" in large["message"]
    assert cut["error"] == "FetchError" and "1000 of 1001 bytes" in cut["message"]
    assert other["error"] == "FetchError" and "content has changed" in other["message"]
    assert unreachable["error"] == "FetchError" and "cannot be reached" in unreachable["message"]


def test_only_a_file_that_is_expected_is_kept(part):
    """Otherwise the graph of one export would run with the weights of another."""
    contents = ["first", "second"]
    expected = {"bytes": 5, "sha256": hashlib.sha256(b"first").hexdigest()}
    kept, requested = part("fetchAgain", [{"contents": contents, "expected": expected}, {"contents": contents}])
    assert (kept, requested) == (["first", "first"], ["first", "second"])
