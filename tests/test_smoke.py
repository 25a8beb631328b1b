"""The main steps of a user as commands, which must work with all versions within the bounds.

`scripts/smoke.sh` runs it with the tests of `_compat` and of the cache's name: in CI in the lowest set of versions, and
for a release that has just come out by `make compat`.
"""

from __future__ import annotations

import json
import logging
import warnings

import pytest
import torch
from cli.command import in_a_process

import deltamem_tool
from deltamem_tool import DeltaMemConfig, MemoryCache, MemoryState, attach, detach

pytestmark = pytest.mark.slow

STEPS = 20
TOLD, ASKED = "By the way, my dog is Bella.", "What is the name of my dog?"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The folder in which each step writes the files that the next ones read."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture(autouse=True)
def no_deprecation():
    """Checks that no library reports a deprecation, in a warning or in its log."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.filterwarnings("error", category=DeprecationWarning, module="deltamem_tool")
        yield
    logging.getLogger("transformers").removeHandler(handler)
    assert not [message for message in messages if "deprecated" in message]


@pytest.fixture(scope="module")
def adapter(workspace):
    """An adapter after a few training steps."""
    recipe = workspace / "recipe.yaml"
    recipe.write_text(
        f"base: builtin:backbone\nout: {workspace / 'adapter'}\ntraining: {{steps: {STEPS}, batch_size: 4}}\n"
    )
    result = in_a_process("train", recipe, "--json", cwd=workspace)
    return json.loads(right(result).out)


def right(result):
    assert result.code == 0, result.err
    assert not any(word in result.err for word in ("Traceback", "Warning", "Failed", "deprecated")), result.err
    return result


def test_attach_generate_save_load(workspace):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltamem_tool.io.names import ASSETS

    base = str(ASSETS / "backbone")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": TOLD}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    plain = model(**ids).logits
    attach(model, DeltaMemConfig(rank=4, delta_init="random"))
    cache = MemoryCache(model)
    generated = model.generate(**ids, cache=cache, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > ids.input_ids.shape[1] and cache.memory is not None
    cache.memory.save(workspace / "some.safetensors")
    deltamem_tool.save_adapter(model, workspace / "attached")
    again = deltamem_tool.load(workspace / "attached", base=base)
    memory = MemoryState.load(workspace / "some.safetensors")
    loaded = MemoryCache(again, memory=memory)
    with torch.no_grad():
        first = model(ids.input_ids, cache=MemoryCache(model, memory=memory)).logits
        assert torch.equal(again(ids.input_ids, cache=loaded).logits, first)
    detach(model)
    assert torch.equal(model(**ids).logits, plain)


def test_train(deltamem, workspace, adapter):
    right(deltamem("patch", "builtin:backbone", "--out", workspace / "fresh", "--state-heads", 4))
    assert adapter["steps"] == STEPS
    report = json.loads(right(deltamem("inspect", adapter["adapter"], "--json")).out)
    assert report["kind"] == "adapter"


def test_evaluate(deltamem, workspace):
    options = ["--task", "recall", "--set", "facts=[1]", "--set", "episodes=4", "--json"]
    report = json.loads(right(deltamem("eval", "builtin:adapter", *options)).out)
    assert report["task"] == "recall"


def test_export_and_run(deltamem, workspace):
    right(deltamem("export", "builtin:adapter", "--out", workspace / "onnx"))
    memory = workspace / "bella.safetensors"
    right(deltamem("run", workspace / "onnx", "--prompt", TOLD, "--save-memory", memory))
    result = right(deltamem("run", workspace / "onnx", "--memory", memory, "--prompt", ASKED, "--json"))
    (answer,) = json.loads(result.out)["answers"]
    assert "Bella" in answer


def test_push_and_pull(deltamem, workspace, adapter, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    pushed = right(deltamem("push", adapter["adapter"], "someone/memory", "--license", "apache-2.0", "--json"))
    assert json.loads(pushed.out)["commit"] == hub.head("someone/memory")
    pulled = json.loads(right(deltamem("pull", "someone/memory", "--out", workspace / "pulled", "--json")).out)
    assert pulled["adapter"] and (workspace / "pulled" / "deltamem.safetensors").is_file()
