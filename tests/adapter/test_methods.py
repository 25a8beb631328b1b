"""Methods that users of PEFT and of transformers' Trainer call, on a model with a memory."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import listing, logits, patched_model, randomise, tiny_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from deltamem_tool import DeltaMemConfig, attach, detach, load, save_adapter, without_memory
from deltamem_tool.adapter.config_file import CONFIG_FILE, WEIGHTS_FILE
from deltamem_tool.errors import AdapterError
from deltamem_tool.memory.attach import adapter_of

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
ADAPTER_FILES = {CONFIG_FILE, WEIGHTS_FILE}


@pytest.fixture
def model(base):
    """A model of a checkpoint, with a memory of random weights."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    randomise(attach(model, DeltaMemConfig(rank=4)))
    return model


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def trainer(model, folder, **options):
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    arguments = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.1, **options}
    arguments |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "weight_decay": 0.0}
    return Trainer(model, TrainingArguments(str(folder), **arguments), train_dataset=rows, eval_dataset=rows)


def test_the_parameter_names_of_the_base_are_unchanged():
    model = tiny_model()
    state, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    attach(model)
    assert list(model.state_dict()) == state
    assert [name for name, _ in model.named_modules()] == modules


@pytest.mark.parametrize("register", [False, True])
def test_only_adapter_parameters_are_trainable(register):
    model = tiny_model()
    before = [name for name, _ in model.named_parameters()]
    adapter = attach(model, register=register)
    mine = [f"deltamem.{name}" for name, _ in adapter.named_parameters()]
    assert trainable(model) == mine
    assert model.num_parameters(only_trainable=True) == adapter.num_parameters()
    assert sorted(name for name, _ in model.named_parameters()) == sorted(before + mine)
    assert [name for name, _ in model.named_parameters(prefix="x")][-1] == f"x.{mine[-1]}"
    detach(model)
    assert [name for name, _ in model.named_parameters()] == before == trainable(model)
    assert "deltamem" not in dict(model.named_modules()) and not hasattr(model, "deltamem")


@pytest.mark.parametrize("register", [False, True])
def test_zero_grad_and_clipping_reach_the_adapter(register):
    model = tiny_model()
    adapter = randomise(attach(model, register=register))
    model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    norm = torch.stack([weight.grad.norm() for weight in adapter.parameters() if weight.grad is not None]).norm()
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9), norm)
    model.zero_grad()
    assert all(weight.grad is None for weight in adapter.parameters())


@pytest.mark.parametrize("register", [False, True])
def test_printing_the_model_shows_the_adapter(register):
    model = tiny_model()
    before = str(model)
    attach(model, DeltaMemConfig(rank=4), register=register)
    assert "(deltamem): DeltaMemAdapter(" in str(model) and "rank=4" in str(model)
    detach(model)
    assert str(model) == before


def test_save_pretrained_writes_only_the_adapter(model, tmp_path):
    expected = logits(model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("stays")
    model.save_pretrained(tmp_path / "out")
    assert set(listing(tmp_path / "out")) == {*ADAPTER_FILES, "mine.txt"}
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    save_adapter(model, tmp_path / "adapter")
    for name in ADAPTER_FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_a_base_that_exists_only_in_memory_is_saved_with_the_adapter(tmp_path):
    model = patched_model()
    model.save_pretrained(tmp_path / "out")
    assert set(listing(tmp_path / "out")) >= {*ADAPTER_FILES, "config.json", "model.safetensors"}
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_save_pretrained_to_a_file_raises(model, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(AdapterError, match="is not a folder"):
        model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_registered_adapter_is_also_saved_with_the_base(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    adapter = randomise(attach(model, DeltaMemConfig(rank=4), register=True))
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert set(listing(tmp_path / "out")) >= {*ADAPTER_FILES, "config.json", "model.safetensors"}
    weights = load_file(tmp_path / "out/model.safetensors")
    for name, weight in adapter.state_dict().items():
        assert torch.equal(weights[f"deltamem.{name}"], weight)
    assert torch.equal(logits(load(tmp_path / "out", base=str(base))), expected)
    again = tiny_model(seed=1)
    attach(again, DeltaMemConfig(rank=4), register=True)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), expected)


def test_the_error_of_loading_a_lora_names_peft(base, tmp_path):
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterError, match="load it with PEFT"):
        load(tmp_path / "lora")


def test_a_lora_is_saved_next_to_the_adapter(base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA).eval()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.constant_(weight, 0.1)
    adapter = randomise(attach(model, DeltaMemConfig(rank=4)))
    assert trainable(model) == [f"deltamem.{name}" for name, _ in adapter.named_parameters()]
    assert "(deltamem): DeltaMemAdapter(" in str(model)
    model.save_pretrained(tmp_path / "out")
    assert set(listing(tmp_path / "out")) >= {*ADAPTER_FILES, "adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(load(tmp_path / "out"), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model))
    detach(model)
    assert "deltamem" not in str(model) and not any("deltamem" in name for name, _ in model.named_parameters())


def test_trainer_trains_the_adapter_and_saves_it(model, tmp_path):
    frozen = {name: weight.clone() for name, weight in model.state_dict().items()}
    before = {name: weight.clone() for name, weight in adapter_of(model).state_dict().items()}
    trainer(model, tmp_path).train()
    after = adapter_of(model).state_dict()
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
    assert all(torch.equal(weight, frozen[name]) for name, weight in model.state_dict().items())
    model.eval()
    assert torch.equal(logits(load(tmp_path / "checkpoint-2")), logits(model))


def test_trainer_resumes_from_a_checkpoint_of_a_registered_adapter(base, tmp_path):
    def fresh():
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        randomise(attach(model, DeltaMemConfig(rank=4), register=True))
        return model

    whole, resumed = fresh(), fresh()
    trainer(whole, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1).train()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert load_file(tmp_path / "checkpoint-2/model.safetensors").keys() == resumed.state_dict().keys()
    whole.eval(), resumed.eval()
    assert torch.equal(logits(load(tmp_path / "checkpoint-2", base=str(base))), logits(resumed))


@pytest.mark.parametrize("register", [False, True])
def test_without_memory_and_casting_work(base, register):
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    expected = logits(plain)
    adapter = randomise(attach(plain, DeltaMemConfig(rank=4), register=register))
    with without_memory():
        assert torch.equal(logits(plain), expected)
    assert not torch.equal(logits(plain), expected)
    plain.to(torch.bfloat16)
    assert {weight.dtype for weight in adapter.parameters()} == {torch.bfloat16 if register else torch.float32}
    assert logits(plain).isfinite().all()


def test_ddp_averages_the_gradients_of_the_adapter(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model, shared = patched_model(), []
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        parallel.register_comm_hook(shared, share)
        parallel(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert {weight.data_ptr() for weight in shared} == {weight.data_ptr() for weight in adapter_of(model).parameters()}


def share(shared, bucket):
    """Record the parameters whose gradients are about to be shared."""
    shared.extend(bucket.parameters())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
