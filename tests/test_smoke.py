"""What every user does, once, by the commands: it has to work with any versions that the bounds admit.

`scripts/smoke.sh` runs it with the tests of `_compat` and of the cache's name: in CI in the lowest set of versions, and
for a release that has just come out by `make compat`.
"""

from __future__ import annotations

import json
import logging
import warnings

import pytest
import torch
from cli.command import deltamem, in_a_process  # noqa: F401  (the first is a fixture)

import deltamem_tool
from deltamem_tool import DeltaMemConfig, MemoryCache, MemoryState, attach, detach

pytestmark = pytest.mark.slow

STEPS = 20
TOLD, ASKED = "By the way, my dog is Bella.", "What is the name of my dog?"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where the steps leave what the next ones take."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture(autouse=True)
def no_deprecation():
    """Nothing that a library says it will take away, by a warning or in its log."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.filterwarnings("error", category=DeprecationWarning, module="deltamem_tool")
        yield
    logging.getLogger("transformers").removeHandler(handler)
    assert not [message for message in said if "deprecated" in message]


@pytest.fixture(scope="module")
def trained(made):
    """An adapter after a few steps."""
    recipe = made / "recipe.yaml"
    recipe.write_text(f"base: builtin:backbone\nout: {made / 'adapter'}\ntraining: {{steps: {STEPS}, batch_size: 4}}\n")
    done = in_a_process("train", recipe, "--json", cwd=made)
    return json.loads(right(done).out)


def right(done):
    assert done.code == 0, done.err
    assert not any(word in done.err for word in ("Traceback", "Warning", "Failed", "deprecated")), done.err
    return done


def test_attach_generate_save_load(made):
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
    said = model.generate(**ids, cache=cache, max_new_tokens=4, do_sample=False)
    assert said.shape[1] > ids.input_ids.shape[1] and cache.memory is not None
    cache.memory.save(made / "some.safetensors")
    deltamem_tool.save_adapter(model, made / "attached")
    again = deltamem_tool.load(made / "attached", base=base)
    memory = MemoryState.load(made / "some.safetensors")
    loaded = MemoryCache(again, memory=memory)
    with torch.no_grad():
        first = model(ids.input_ids, cache=MemoryCache(model, memory=memory)).logits
        assert torch.equal(again(ids.input_ids, cache=loaded).logits, first)
    detach(model)
    assert torch.equal(model(**ids).logits, plain)


def test_train(deltamem, made, trained):  # noqa: F811
    right(deltamem("patch", "builtin:backbone", "--out", made / "fresh", "--state-heads", 4))
    assert trained["steps"] == STEPS
    said = json.loads(right(deltamem("inspect", trained["adapter"], "--json")).out)
    assert said["kind"] == "adapter"


def test_evaluate(deltamem, made):  # noqa: F811
    options = ["--task", "recall", "--set", "facts=[1]", "--set", "episodes=4", "--json"]
    said = json.loads(right(deltamem("eval", "builtin:adapter", *options)).out)
    assert said["task"] == "recall"


def test_export_and_run(deltamem, made):  # noqa: F811
    right(deltamem("export", "builtin:adapter", "--out", made / "onnx"))
    memory = made / "bella.safetensors"
    right(deltamem("run", made / "onnx", "--prompt", TOLD, "--save-memory", memory))
    done = right(deltamem("run", made / "onnx", "--memory", memory, "--prompt", ASKED, "--json"))
    (answer,) = json.loads(done.out)["answers"]
    assert "Bella" in answer


def test_push_and_pull(deltamem, made, trained, hub, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    pushed = right(deltamem("push", trained["adapter"], "someone/memory", "--license", "apache-2.0", "--json"))
    assert json.loads(pushed.out)["commit"] == hub.head("someone/memory")
    pulled = json.loads(right(deltamem("pull", "someone/memory", "--out", made / "pulled", "--json")).out)
    assert pulled["adapter"] and (made / "pulled" / "deltamem.safetensors").is_file()
