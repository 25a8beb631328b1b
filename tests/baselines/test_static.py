"""A static adapter: it has no memory, trains on the same episodes, and is evaluated in the same run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from base_model.tiny_configs import tiny_config
from baselines.statics import make_static, shaken
from evaluation.asked import Asked, answers, item
from helpers.tiny import logits, randomise, tiny_model
from safetensors.torch import load_file, save_file
from training.short_runs import changed, short_run
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, attach, load
from deltamem_tool.adapter.config_file import CONFIG_FILE, WEIGHTS_FILE
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.base_model.attention import attention_layers
from deltamem_tool.baselines.static import Static, StaticAdapter, new_static
from deltamem_tool.errors import AdapterError, ConfigError, DataError
from deltamem_tool.evaluation import subject as subjects
from deltamem_tool.evaluation.conditions import EvalProtocol
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.recipe.load import LoraOptions, ObjectiveOptions
from deltamem_tool.segments.template import render
from deltamem_tool.training import dry_run, train
from deltamem_tool.training.baseline_steps import StaticStepModel

MEMORY = EvalProtocol.parse("memory")
TASK = Asked([item(number) for number in range(3)])
CONFIG = DeltaMemConfig(rank=4, state_heads=2, branches=["q", "v", "o"])
TOLERANCE = 1e-5  # logits in float32, whose sums are taken in another order
OPTIONS = [
    {},
    {"delta_scale": "branch", "delta_scale_init": 0.5},
    {"delta_scale": "layer", "o_norm": True},
]


@pytest.fixture(scope="module")
def model(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    randomise(attach(model, CONFIG))
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return make_static(model, CONFIG, tmp_path_factory.mktemp("static") / "static")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("model_type", ["qwen3", "gpt_neox"])  # the second has q, k and v in one linear layer
def test_a_static_adapter_adds_the_same_to_every_token(options, model_type):
    """Compared with Δ times the constant."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    config = dataclasses.replace(CONFIG, **options)
    layers = attention_layers(model)
    adapter = shaken(StaticAdapter(config, layers))
    outputs = {}

    def keep(module, args, output):
        outputs[module] = args[0], output

    adapter.attach_to(model)
    for layer in layers:
        for branch in config.branches:
            layer.projection(branch).linear.register_forward_hook(keep)  # after the adapter's own
    logits(model)
    for layer in layers:
        static = adapter.layer(layer.index)
        for branch in config.branches:
            projection = layer.projection(branch)
            steer = static.delta_of(branch).weight @ static.constant * config.alpha / config.rank
            if config.delta_scale != "fixed":
                which = 0 if config.delta_scale == "layer" else "qkvo".index(branch)
                steer = steer * torch.sigmoid(static.scale_raw[which]) * config.delta_scale_max
            if branch == "o" and config.o_norm:
                steer = steer / (steer.square().mean() + config.o_norm_eps).sqrt() * static.o_norm.weight
            entered, output = outputs[projection.linear]
            plain = projection.take(projection.linear.forward(entered))
            added = projection.take(output) - plain
            torch.testing.assert_close(added, steer.expand_as(plain), atol=TOLERANCE, rtol=TOLERANCE)


def test_answers_do_not_depend_on_the_history(model, tokenizer, checkpoint, folder):
    """They equal the answers of a model that sees only the question."""
    evaluation = evaluate(model, tokenizer, TASK, MEMORY, only=("no_adapter", "static"), static=Static.read(folder))
    alone = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    Static.read(folder).adapter_for(alone).attach_to(alone)
    ids = tokenizer(render(tokenizer, TASK.items()[0].question, True), return_tensors="pt").input_ids
    output = alone.generate(ids, max_new_tokens=TASK.max_new_tokens, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert answers(evaluation, "static") == [expected] * 3 != answers(evaluation, "no_adapter")
    meaning = next(condition.meaning for condition in evaluation.conditions if condition.name == "static")
    count = sum(weight.numel() for weight in load_file(folder / WEIGHTS_FILE).values())
    assert f"static adapter static, {count:,} trained parameters" in meaning


def test_conditions_that_leave_out_a_baseline_are_rejected(model, tokenizer, folder):
    static = Static.read(folder)
    with pytest.raises(ConfigError, match="The baseline static would not be used"):
        evaluate(model, tokenizer, TASK, MEMORY, only=("no_adapter",), static=static)
    with pytest.raises(ConfigError, match="The baseline bm25 would not be used"):
        evaluate(model, tokenizer, TASK, MEMORY, only=("no_adapter", "static"), static=static, retrieved=True)


def test_the_base_is_unchanged_after_evaluation(model, tokenizer, folder, monkeypatch):
    before = logits(model)
    evaluate(model, tokenizer, TASK, MEMORY, only=("static",), static=Static.read(folder))
    assert torch.equal(logits(model), before)
    with Static.read(folder).applied_to(model):
        assert not torch.allclose(logits(model), before)
    assert torch.equal(logits(model), before)
    with monkeypatch.context() as patched:
        patched.setattr(subjects, "answer_prompts", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(model, tokenizer, TASK, MEMORY, only=("static",), static=Static.read(folder))
    assert torch.equal(logits(model), before)


def test_records_of_another_static_adapter_are_not_reused(model, tokenizer, folder, tmp_path):
    options = {"only": ("static",), "folder": tmp_path / "records"}
    first = evaluate(model, tokenizer, TASK, MEMORY, static=Static.read(folder), **options)
    assert evaluate(model, tokenizer, TASK, MEMORY, static=Static.read(folder), **options).records == first.records
    other = Static.read(make_static(model, CONFIG, tmp_path / "other", seed=1))
    with pytest.raises(DataError, match="Its static differ"):
        evaluate(model, tokenizer, TASK, MEMORY, static=other, **options)


def test_a_static_adapter_that_does_not_match_the_memory_raises(model, tokenizer, folder, tmp_path):
    before = logits(model)
    fewer = make_static(model, dataclasses.replace(CONFIG, branches=("q", "o")), tmp_path / "fewer")
    wider = make_static(model, dataclasses.replace(CONFIG, rank=8), tmp_path / "wider")
    for place, says in ((fewer, r"delta\.v"), (wider, r"delta\.q")):
        with pytest.raises(AdapterError, match=f"does not match the memory.*\n.*{says}"):
            evaluate(model, tokenizer, TASK, MEMORY, static=Static.read(place))
    other = tiny_model(seed=5, vocab_size=model.config.vocab_size)
    attach(other, CONFIG)
    with pytest.raises(AdapterError, match="was trained on another base model"):
        evaluate(other, tokenizer, TASK, MEMORY, static=Static.read(folder))
    assert torch.equal(logits(model), before)


def test_damaged_folders_raise(model, folder, tmp_path):
    with pytest.raises(AdapterError, match=f"not the folder of a static adapter.*\n.*{CONFIG_FILE}"):
        Static.read(tmp_path)
    weights = load_file(folder / WEIGHTS_FILE)
    first = sorted(weights)[0]
    broken = {
        "less": {name: weight for name, weight in weights.items() if name != first},
        "NaN": weights | {first: torch.full_like(weights[first], torch.nan)},
    }
    for name, content in broken.items():
        place = tmp_path / name
        place.mkdir()
        (place / CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes())
        save_file(content, place / WEIGHTS_FILE)
        with pytest.raises(AdapterError, match=f"does not fit the model.*\n.*{first}"):
            Static.read(place).adapter_for(model)
    (place / WEIGHTS_FILE).write_bytes(b"cut")
    with pytest.raises(AdapterError, match="is damaged"):
        Static.read(place).adapter_for(model)


def test_static_adapters_and_memories_are_not_interchangeable(model, checkpoint, folder, tmp_path):
    with pytest.raises(AdapterError, match=r"has no memory.\n.*static adapter.*\n.*--static"):
        load(folder)
    create_adapter(str(checkpoint), CONFIG, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"is not a static adapter.\nIt has a memory.\n.*static=true"):
        Static.read(tmp_path / "adapter")


@pytest.fixture
def recipe(checkpoint, tmp_path):
    return dataclasses.replace(short_run(checkpoint, tmp_path), memory=CONFIG, static=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"eval_every": 8}], ids=str)
def test_training_reduces_the_loss(recipe, options):
    """Training can be resumed, as with a memory."""
    result = train(changed(recipe, **{"steps": 16, "eval_every": None, **options}))
    losses = [loss for _, loss in result.losses]
    assert losses[-1] < 0.95 * losses[0]
    weights = load_file(f"{recipe.out}/{WEIGHTS_FILE}")
    assert sum(weight.numel() for weight in weights.values()) == result.parameters
    assert weights["layers.0.constant"].shape == (8,) and all(weight.isfinite().all() for weight in weights.values())
    more = dataclasses.replace(recipe, adapter=recipe.out, memory=DeltaMemConfig(), out=f"{recipe.out}-more")
    on = train(changed(more, steps=2, eval_every=None)).losses
    assert on[0][1] < 0.95 * losses[0]
    assert Static.read(more.out).config == CONFIG
    expected, memory = dry_run(recipe), dry_run(dataclasses.replace(recipe, static=False))
    assert expected.trained_parameters == result.parameters < memory.trained_parameters
    assert expected.memory_bytes == 0 and expected.tokens_per_step < memory.tokens_per_step
    assert dry_run(more).trained_parameters == result.parameters


def test_a_new_static_adapter_equals_the_base_and_gets_gradients(checkpoint):
    """Δ is zero, as in a new memory. The constant is not, or the gradients would be zero."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    before = logits(model)
    adapter = new_static(CONFIG, attention_layers(model), lambda projection, count: projection.weight[:, :count])
    handles = adapter.attach_to(model)
    assert torch.equal(logits(model), before)
    ids = torch.arange(3, 9)[None]
    step = StaticStepModel(model, adapter)
    step(ids, None, torch.tensor([2, 4]), torch.tensor([5, 6]))["loss"].backward()
    deltas = [weight.grad for name, weight in adapter.named_parameters() if "delta" in name]
    assert all(grad.abs().max() > 0 for grad in deltas)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(handles)


def test_the_teacher_runs_without_the_static_adapter(checkpoint):
    """The divergence is from the base with the history in view. The next step uses the adapter again."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    before = logits(model)
    adapter = shaken(StaticAdapter(CONFIG, attention_layers(model)))
    step = StaticStepModel(model, adapter, objective=ObjectiveOptions(full_context_kl=0.5))
    ids, scored = torch.arange(3, 9)[None], torch.tensor([2, 4])
    with_it = logits(model)
    teacher = step.base_logits(ids, None, scored)
    assert torch.equal(logits(model), with_it) and not torch.allclose(with_it, before)
    base = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        torch.testing.assert_close(teacher, base(ids).logits[0, scored], atol=TOLERANCE, rtol=TOLERANCE)
    parts = step(ids, None, scored, torch.tensor([5, 6]), ids, None, scored)
    torch.testing.assert_close(parts["loss"], parts["answer"] + 0.5 * parts["kl"])


def test_training_a_static_adapter_and_a_lora_together_raises(recipe):
    with pytest.raises(ConfigError, match="a static adapter or a LoRA"):
        dataclasses.replace(recipe, memory=DeltaMemConfig(), lora=LoraOptions())
