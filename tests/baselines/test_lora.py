"""A LoRA on the same base, evaluated in the same run as the memory."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
from baselines.loras import make_lora
from evaluation.asked import Asked, answers, item
from helpers.tiny import logits, randomise, save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, attach, detach
from deltamem_tool.baselines.lora import CONFIG_FILE, WEIGHTS_FILE, Lora
from deltamem_tool.errors import AdapterError, DataError
from deltamem_tool.evaluation import subject as subjects
from deltamem_tool.evaluation.conditions import EvalProtocol, conditions_of
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.memory.attach import adapter_of, hook
from deltamem_tool.segments.template import render

MEMORY = EvalProtocol.parse("memory")
TASK = Asked([item(number, sessions=1 + number % 2) for number in range(3)])


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    return make_lora(checkpoint, tmp_path_factory.mktemp("lora") / "lora")


@pytest.fixture(scope="module")
def model(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    randomise(attach(model, DeltaMemConfig(rank=4)))
    return model


def copied(folder, to, **changes):
    """The LoRA with another config."""
    to.mkdir()
    config = json.loads((folder / CONFIG_FILE).read_text())
    (to / CONFIG_FILE).write_text(json.dumps({**config, **changes}))
    (to / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes())
    return to


def test_a_lora_answers_as_in_peft(model, tokenizer, checkpoint, folder):
    lora = Lora.read(folder)
    evaluation = evaluate(model, tokenizer, TASK, MEMORY, only=("no_adapter", "lora", "lora_full_context"), lora=lora)
    alone = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), str(folder)).eval()
    for condition, context in (("lora", False), ("lora_full_context", True)):
        expected = []
        for each in TASK.items():
            history = [message for session in each.history for message in session] if context else []
            ids = tokenizer(render(tokenizer, [*history, *each.question], True), return_tensors="pt").input_ids
            output = alone.generate(input_ids=ids, max_new_tokens=TASK.max_new_tokens, do_sample=False)
            expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
        assert answers(evaluation, condition) == expected != answers(evaluation, "no_adapter")
    assert "lora_full_context" not in {c.name for c in conditions_of(EvalProtocol.parse("full"), lora=lora)}


@pytest.mark.parametrize("fails", [False, True])
def test_the_base_is_unchanged_after_evaluating_a_lora(model, tokenizer, folder, fails, monkeypatch):
    """The base and the memory on it are bit-identical, even after an answer that fails."""
    adapter = adapter_of(model)
    detach(model)
    base, names = logits(model), list(model.state_dict())
    modules = [(name, type(module)) for name, module in model.named_modules()]
    hook(model, adapter)
    remembering, trains = logits(model), [parameter.requires_grad for parameter in model.parameters()]
    lora = Lora.read(folder)
    with monkeypatch.context() as patched:
        if fails:
            patched.setattr(subjects, "answer_prompts", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                evaluate(model, tokenizer, TASK, MEMORY, only=("lora",), lora=lora)
        else:
            evaluate(model, tokenizer, TASK, MEMORY, only=("lora",), lora=lora)
    assert torch.equal(logits(model), remembering) and adapter_of(model) is adapter
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    detach(model)
    assert torch.equal(logits(model), base) and list(model.state_dict()) == names
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    with lora.applied_to(model):
        assert not torch.allclose(logits(model), base)
    assert torch.equal(logits(model), base)
    hook(model, adapter)


def test_a_lora_of_another_base_raises(model, checkpoint, folder, tmp_path):
    other = save_checkpoint(tmp_path / "other", seed=5, vocab_size=model.config.vocab_size)
    for name, base, says in (
        ("other", str(other), "was trained on another base model"),
        ("none", None, "does not say which model"),
        ("gone", str(tmp_path / "gone"), "cannot be compared"),
    ):
        changed = copied(folder, tmp_path / f"lora of {name}", base_model_name_or_path=base)
        with pytest.raises(AdapterError, match=says):
            Lora.read(changed).check_base(model)
    Lora.read(folder).check_base(model)
    (tmp_path / "same").symlink_to(checkpoint)  # under another name
    moved = copied(folder, tmp_path / "moved", base_model_name_or_path=str(tmp_path / "same"))
    Lora.read(moved).check_base(model)


def test_folders_that_are_not_loras_raise(model, folder, tmp_path):
    with pytest.raises(AdapterError, match=r"is not a LoRA folder.*\n.*adapter_config.json"):
        Lora.read(tmp_path)
    with pytest.raises(AdapterError, match="peft_type is 'IA3'"):
        Lora.read(copied(folder, tmp_path / "ia3", peft_type="IA3"))
    less = copied(folder, tmp_path / "less")
    weights = load_file(less / WEIGHTS_FILE)
    missing = sorted(weights)[0]
    save_file({name: weight for name, weight in weights.items() if name != missing}, less / WEIGHTS_FILE)
    nowhere = copied(folder, tmp_path / "nowhere", target_modules=["nowhere"])
    adapter = adapter_of(model)
    detach(model)
    before = logits(model)
    for place, says in ((less, missing.replace(".", r"\.")), (nowhere, "nowhere")):
        with (
            pytest.raises(AdapterError, match=f"does not fit the model.*\n.*{says}"),
            Lora.read(place).applied_to(model),
        ):
            pytest.fail("it was put on")
    (less / WEIGHTS_FILE).write_bytes(b"cut")
    with pytest.raises(AdapterError, match="is damaged"), Lora.read(less).applied_to(model):
        pytest.fail("it was put on")
    assert torch.equal(logits(model), before)
    hook(model, adapter)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_records_of_another_lora_are_not_reused(model, tokenizer, checkpoint, folder, tmp_path):
    options = {"only": ("lora",), "folder": tmp_path / "records"}
    first = evaluate(model, tokenizer, TASK, MEMORY, lora=Lora.read(folder), **options)
    again = evaluate(model, tokenizer, TASK, MEMORY, lora=Lora.read(folder), **options)
    assert again.records == first.records
    other = Lora.read(make_lora(checkpoint, tmp_path / "other", seed=1))
    assert replace(other, folder=folder).fingerprint == Lora.read(folder).fingerprint != other.fingerprint
    with pytest.raises(DataError, match="Its lora differ"):
        evaluate(model, tokenizer, TASK, MEMORY, lora=other, **options)
    options["only"] = ("lora", "truncated")
    with pytest.raises(DataError, match="Its truncate differ"):
        evaluate(model, tokenizer, TASK, MEMORY, lora=Lora.read(folder), truncate=9, **options)
