"""`deltamem bench` on tiny models: each side is the model it names, sizes are exact, and errors are short."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny import patched_model, tiny_model, tokens

from deltamem_tool import DeltaMemConfig, MemoryCache, detach, load
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.baselines.lora import Lora, lora_parameters, new_lora, random_lora
from deltamem_tool.bench import BASE, LORA, MEMORY, MODELS, PYTORCH, SEGMENT
from deltamem_tool.bench.models import load_apart, modify_model, shared_copy, torch_sides
from deltamem_tool.bench.peak import peak_of, torch_side
from deltamem_tool.bench.setting import Setting
from deltamem_tool.bench.sides import GraphFolder, TorchSide
from deltamem_tool.errors import AdapterError, ConfigError, DeltaMemError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.file import read_memory
from deltamem_tool.recipe.load import LoraOptions

POSITIONS = 512  # of the tiny checkpoint


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "adapter"
    create_adapter(str(checkpoint), DeltaMemConfig(rank=4), out)
    return out


def save_lora(folder, base, name=None):
    new_lora(base, LoraOptions(rank=3), name).save_pretrained(folder, save_embedding_layers=False)
    return folder


def apart(model):
    """The model, and the memory that was on it."""
    adapter = adapter_of(model)
    detach(model)
    return model, adapter


def generated(side, ids, count):
    logits, past = side.call(ids.numpy())
    chosen = [side.choose(logits)]
    for _ in range(count - 1):
        logits, past = side.call(chosen[-1], past)
        chosen.append(side.choose(logits))
    return torch.cat([torch.from_numpy(each) for each in chosen], dim=1), past


def test_each_side_is_the_model_that_it_names():
    model, memory = apart(patched_model())
    sides = torch_sides(model, memory, Setting("adapter"))
    ids, options = tokens(2, 40), {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = {BASE: tiny_model(), MEMORY: patched_model(), LORA: random_lora(tiny_model(), memory, seed=0).eval()}
    answers = {}
    for name, other in expected.items():
        answers[name] = generated(sides[name], ids, 5)[0]
        assert torch.equal(answers[name], other.generate(ids, **options)[:, 40:]), name
    assert not torch.equal(answers[BASE], answers[MEMORY])


def test_sides_share_only_their_weights():
    model, memory = apart(patched_model())
    twin = modify_model(MEMORY, shared_copy(model), memory, Setting("adapter"))
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    adapter_of(twin)
    lora = modify_model(LORA, shared_copy(model), memory, Setting("adapter"))
    assert lora_parameters(lora) and not any("lora" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(tokens(1, 9)).logits, tiny_model()(tokens(1, 9)).logits)


def test_messages_are_written_at_their_end():
    model = patched_model(granularity="message")
    _, cache = generated(TorchSide(model), tokens(2, SEGMENT + 5), 4)
    assert cache.memory.open_tokens.tolist() == [5 + 3, 5 + 3]
    expected = MemoryCache(model)
    with torch.no_grad():
        expected.open_segments = torch.ones((2, SEGMENT), dtype=torch.int8)
        model(tokens(2, SEGMENT + 5)[:, :SEGMENT], cache=expected)
    expected.end_segment()
    for layer, state in expected.memory.layers.items():
        assert state.abs().max() > 0
        torch.testing.assert_close(cache.memory.layers[layer], state, atol=1e-5, rtol=0)


def test_a_random_lora_has_the_size_of_the_memory():
    model, memory = apart(patched_model(rank=8))
    lora = random_lora(model, memory, seed=0)
    rank, of_memory = lora.active_peft_config.r, sum(weight.numel() for weight in memory.parameters())
    assert abs(lora_parameters(lora) - of_memory) <= lora_parameters(lora) / rank / 2
    weights = {name: weight for name, weight in lora.named_parameters() if "lora_" in name}
    assert {name.split(".")[-4] for name in weights} == {"q_proj", "o_proj"}
    assert all(weight.std() > 0 and not weight.requires_grad for weight in weights.values())


def test_a_lora_has_the_dtype_of_the_base():
    model, memory = apart(patched_model())
    lora = random_lora(model.to(torch.bfloat16), memory, seed=0)
    assert {weight.dtype for weight in lora.parameters()} == {torch.bfloat16}


def test_figures_counts_and_sizes_are_reported(adapter, checkpoint, deltamem, tmp_path):
    out, prompts = tmp_path / "bench.json", [40, 8]
    options = ("--prompt", "40,8", "--decode", 3, "--repeats", 2, "--batch-size", 2, "--threads", 1, "--no-peak")
    done = deltamem("bench", adapter, *options, "--device", "cpu", "--out", out, "--json")
    assert done.code == 0, done.err
    assert "Warning" not in done.err
    result = json.loads(done.out)
    assert result == json.loads(out.read_text())
    assert [each["tokens"] for each in result["prompts"]] == prompts
    names = {f"{PYTORCH} {model}" for model in MODELS}
    for each in result["prompts"]:
        assert len(each["order"]) == 2 and all(set(order) == names for order in each["order"])
        assert each["sides"].keys() == names
        for side in each["sides"].values():
            prefill, first, decode = (side["seconds"][name] for name in ("prefill", "first_token", "decode"))
            assert len(prefill) == len(first) == len(decode) == 2
            assert all(0 < a < b for a, b in zip(prefill, first, strict=True)) and min(decode) > 0

    model, sizes = load(adapter), result["sizes"]
    adapter_of(model).empty_memory(1).save(tmp_path / "memory")
    assert sizes["memory_file"] == (tmp_path / "memory").stat().st_size
    assert sizes["state"] == sum(state.nbytes for state in read_memory(tmp_path / "memory").states.values()) == 128
    of_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, float32
    assert sizes["cache"] == {str(prompt): prompt * of_token for prompt in prompts}
    assert result["parameters"][MEMORY] == sum(weight.numel() for weight in adapter_of(model).parameters())
    assert result["setting"]["dtype"] == "float32" and result["machine"]["threads"] == 1 and result["packages"]["torch"]


def test_the_measuring_process_creates_the_same_models(adapter):
    """The process itself is tested in tests/onnx, where it does not import PyTorch."""
    ids, setting = tokens(1, 9).numpy(), Setting(str(adapter), prompts=(9,))
    model, memory = load_apart(setting, None)
    for name, side in torch_sides(model, memory, setting).items():
        alone, vocab_size = torch_side(name, setting)
        assert torch.equal(alone.call(ids)[0], side.call(ids)[0]) and vocab_size == model.config.vocab_size


def test_a_failed_process_is_named(adapter):
    with pytest.raises(DeltaMemError, match="onnx base could not be measured") as raised:
        peak_of(Setting(str(adapter)), "onnx", BASE, GraphFolder(adapter, None))
    assert "AttributeError" in raised.value.why and "--no-peak" in raised.value.next


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "8,x"), ("not a list such as 1,2,4", "--prompt")),
        (("--prompt", "8,8"), ("twice", "--prompt")),
        (("--prompt", "0"), ("prompt length is 0",)),
        (("--decode", 0), ("0", "--decode")),
        (("--models", "memory"), ("do not include base",)),
        (("--models", "base,toaster"), ("'toaster'", "base,memory,lora")),
        (("--runtimes", "pytorch,abacus"), ("'abacus'", "pytorch,onnx")),
        (("--models", "base,memory", "--lora", "x"), ("x would not be used",)),
        (("--runtimes", "pytorch", "--onnx", "x"), ("x would not be used",)),
        (("--prompt", f"8,{POSITIONS}", "--decode", 1), (f"{POSITIONS} positions", f"at most {POSITIONS - 1}")),
        (("--prompt", 8, "--decode", POSITIONS), ("Decode fewer tokens",)),
        (("--lora", "nowhere"), ("no LoRA folder nowhere",)),
        (("--onnx", "nowhere"), ("nowhere",)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_invalid_usage_gives_a_short_error(adapter, deltamem, options, words, tmp_path):
    out = tmp_path / "out.json"
    deltamem("bench", adapter, "--device", "cpu", "--no-peak", *options, "--out", out).assert_short_error(*words)
    assert not out.exists()


def test_a_lora_saved_by_peft_is_loaded(tmp_path):
    base = tiny_model()
    folder = save_lora(tmp_path / "lora", base, "builtin:backbone")
    lora = Lora.read(folder).for_inference(tiny_model())
    assert lora.active_peft_config.r == 3 and lora_parameters(lora) == 2 * 3 * (32 + 64 + 64 + 32)
    with pytest.raises(AdapterError, match="made for another base model"):
        Lora.read(folder).check_base_name(["someone/else"])
    for names in (["builtin:backbone"], ["builtin:backbone", "someone/else"], ["./a/path"], []):
        Lora.read(folder).check_base_name(names)  # a path says nothing about the name


def test_a_lora_of_another_model_raises(tmp_path):
    folder = save_lora(tmp_path / "wide", tiny_model(hidden_size=64))
    with pytest.raises(AdapterError, match="does not fit"):
        Lora.read(folder).for_inference(tiny_model())
    folder = save_lora(tmp_path / "deep", tiny_model(num_hidden_layers=3))
    with pytest.raises(AdapterError, match="missing, extra"):
        Lora.read(folder).for_inference(tiny_model())
    folder = save_lora(tmp_path / "shallow", tiny_model(num_hidden_layers=1))
    with pytest.raises(AdapterError, match="missing, extra"):
        Lora.read(folder).for_inference(tiny_model())


def test_folders_that_are_not_loras_raise(tmp_path):
    folder = save_lora(tmp_path / "lora", tiny_model())
    config = folder / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "peft_type": "IA3"}))
    with pytest.raises(AdapterError, match="peft_type is 'IA3'"):
        Lora.read(folder).for_inference(tiny_model())
    config.write_text("{")
    with pytest.raises(AdapterError, match="is not JSON"):
        Lora.read(folder).for_inference(tiny_model())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        Lora.read(folder).for_inference(tiny_model())


def test_invalid_settings_raise():
    setting = Setting("adapter", prompts=(3, 5), models=(BASE, LORA), dtype="float16", threads=2)
    with pytest.raises(ConfigError, match="repeats is 0"):
        Setting("adapter", repeats=0)
    with pytest.raises(ConfigError, match="seed is -1"):
        Setting("adapter", seed=-1)
    with pytest.raises(ConfigError, match="too large"):
        Setting("adapter", batch_size=10**18)
    with pytest.raises(ConfigError, match="1024 or fewer"):
        Setting("adapter", threads=10**9)
    for device, runtimes, words in (
        ("mps", ("pytorch",), "support the device mps"),
        ("cuda:1", ("pytorch", "onnx"), "not run ONNX Runtime on cuda:1"),
    ):
        with pytest.raises(ConfigError, match=words):
            Setting("adapter", device=device, runtimes=runtimes)
    assert (setting.ids(5, 9) == Setting("other", prompts=(5,)).ids(5, 9)).all()
