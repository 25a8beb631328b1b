"""A base spread over devices, or offloaded: each layer's memory is on the layer's device, and nothing else moves.

Without a second device, placement is tested with fake tensors (`spread`), and the numbers with bases whose weights
accelerate keeps on the CPU or on disk.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers.forked_process import run_in_fork
from helpers.model_runs import run
from helpers.tiny import PAD, patched_model, randomise, save_checkpoint, tiny_model, tiny_tokenizer, tokens
from memory import spread
from transformers import AutoModelForCausalLM

from deltamem_tool import (
    Conversation,
    DeltaMemConfig,
    TorchModel,
    attach,
    export_onnx,
    load,
    save_adapter,
)
from deltamem_tool.adapter.config_file import WEIGHTS_FILE
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.errors import ArchitectureError, ExportError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.file import read_memory

DISK = dict.fromkeys(spread.SPLIT, "disk")
MIXED = {**dict.fromkeys(spread.SPLIT, "cpu"), "model.layers.0": "disk", "lm_head": "disk"}
APART = [[spread.FIRST], [spread.SECOND]]


@pytest.mark.slow
def test_each_memory_layer_is_on_the_device_of_its_hidden_states():
    results = run_in_fork(spread.seen)
    assert "same device" in results["mixed"]  # which the other calls do not do
    for granularity in ("token", "message"):
        start, *calls = results[granularity]
        assert start == [["cpu"], ["cpu"]]
        assert len(calls) == 6 and all(places == APART for places in calls)
    assert results["moved"] == [[[device]] * 2 for device in ("cpu", spread.FIRST, spread.SECOND)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an adapter and its base."""
    folder = tmp_path_factory.mktemp("offloaded")
    base = save_checkpoint(folder / "base", tiny_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(base)
    randomise(attach(model, DeltaMemConfig(rank=4)))
    save_adapter(model, folder / "adapter")
    return folder


def by_a_map(folder, places):
    return load(folder / "adapter", device_map=places, offload_folder=str(folder / "weights"))


def dispatched(folder, tmp_path):
    model = load(folder / "adapter")
    return dispatch_model(model, MIXED, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)


def offloaded_before(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    disk_offload(model, str(tmp_path))
    adapter = attach(model, DeltaMemConfig(rank=4))
    adapter.load_state_dict(adapter_of(load(folder / "adapter")).state_dict())
    return model.eval()


OFFLOADED = {
    "all on disk": lambda folder, tmp_path: by_a_map(folder, DISK),
    "disk and CPU": lambda folder, tmp_path: by_a_map(folder, MIXED),
    "auto": lambda folder, tmp_path: by_a_map(folder, "auto"),
    "cpu_offload": lambda folder, tmp_path: cpu_offload(load(folder / "adapter")),
    "disk_offload": lambda folder, tmp_path: disk_offload(load(folder / "adapter"), str(tmp_path)),
    "dispatch_model": dispatched,
    "offloaded before": offloaded_before,
}


@pytest.mark.parametrize("kind", OFFLOADED)
def test_an_offloaded_base_gives_the_same_logits_and_memory(folder, tmp_path, kind):
    plain, offloaded = load(folder / "adapter"), OFFLOADED[kind](folder, tmp_path / "weights")
    results = []
    for name, model in (("plain", plain), ("offloaded", offloaded)):
        conversation = Conversation(TorchModel(model, tiny_tokenizer()))
        answers = [conversation.generate(text, Sampling(max_new_tokens=4)).text for text in ("My dog is Rex.", "And?")]
        conversation.save_memory(tmp_path / f"{name}.safetensors")
        save_adapter(model, tmp_path / name)
        logits, cache = run(model, tokens(1, 9), cuts=[5])
        cache.memory.save(tmp_path / f"{name}-states.safetensors")
        digests = [read_memory(tmp_path / f"{name}{end}.safetensors").digest() for end in ("", "-states")]
        generated = model.generate(tokens(1, 5), max_new_tokens=4, pad_token_id=PAD)
        numbers = (tmp_path / name / WEIGHTS_FILE).read_bytes()
        results.append((answers, digests, logits.tolist(), generated.tolist(), numbers))
    assert results[0] == results[1]
    assert (kind == "auto") != any(weight.is_meta for weight in offloaded.parameters())  # auto: everything fits


def test_a_new_memory_can_start_from_offloaded_columns(folder, tmp_path):
    config = DeltaMemConfig(rank=4, delta_init="base_slice")
    plain, offloaded = (AutoModelForCausalLM.from_pretrained(folder / "base") for _ in range(2))
    disk_offload(offloaded, str(tmp_path))
    torch.manual_seed(0)
    expected = attach(plain, config).state_dict()
    torch.manual_seed(0)
    for name, weight in attach(offloaded, config).state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert expected["layers.0.delta.q.weight"].any()


def test_unsupported_operations_on_offloaded_weights_raise(folder, tmp_path):
    with pytest.raises(ExportError, match="spread over devices or processes, or offloaded"):
        export_onnx(by_a_map(folder, DISK), tiny_tokenizer(), tmp_path / "onnx")
    model = patched_model()
    registered = tiny_model()
    adapter = attach(registered, DeltaMemConfig(rank=4), register=True)
    adapter.load_state_dict(adapter_of(model).state_dict())
    cpu_offload(registered)
    for call in (lambda: registered(tokens(1, 5)), lambda: save_adapter(registered, tmp_path / "adapter")):
        with pytest.raises(ArchitectureError, match="offloaded with the base"):
            call()
    assert not list(tmp_path.iterdir())
