"""A dry run predicts sizes, steps, tokens and memory of the real run. It writes nothing and needs no weights."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import END, PAD, base_parameters, listing, save_checkpoint, tiny_config, write_jsonl
from safetensors.torch import load_file

from deltamem_tool import DeltaMemConfig
from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.data.synthetic import DialogueEpisodes
from deltamem_tool.errors import ArchitectureError, ConfigError, DataError
from deltamem_tool.ops.scan import use_implementation
from deltamem_tool.recipe.load import DataOptions, LoraOptions, ObjectiveOptions, Recipe, TrainingOptions
from deltamem_tool.training import DryRun, dry_run, peak_bytes, train
from deltamem_tool.training.peak_bytes import (
    LiveBytes,
    StepShape,
    activation_bytes,
    layer_period,
    step_peaks,
    with_layers,
)
from deltamem_tool.training.run import run_data, step_model

SHAPE = StepShape(conversations=2, write=96, exchanges=3, read=24, full=120, scored=18, unrelated=30)
LAYERS = 5  # more than the two models that are run without numbers have


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Seven conversations of unlike length, one of them too long for the write pass."""
    conversations = [[user(f"My lucky number is {n}. " * (n + 1)), assistant("Okay.")] for n in range(6)]
    conversations.append([user("word " * 300), assistant("Okay.")])
    rows = [[*talk, user("Which one is it?"), assistant(f"It is {n}.")] for n, talk in enumerate(conversations)]
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("deep"), num_hidden_layers=LAYERS, intermediate_size=128)


def make_recipe(base: Path, out: Path = Path("adapter"), path: Path | None = None, lora=None, **options) -> Recipe:
    """`options` of the training, and those of other sections by their own names."""
    sections = {name: options.pop(name) for name in ("data", "objective", "memory") if name in options}
    static = options.pop("static", False)
    usual = {"steps": 3, "batch_size": 2} if path is None else {"batch_size": 2}
    data = {
        "path": None if path is None else str(path),
        "max_write_tokens": 200,
        "max_read_tokens": 60,
        "facts_last": 3,
    }
    memory = DeltaMemConfig(**{"rank": 4, "state_heads": 2, **sections.get("memory", {})})
    return Recipe(
        base=str(base),
        out=str(out),
        memory=DeltaMemConfig() if lora else memory,
        lora=lora,
        static=static,
        data=DataOptions(**data | sections.get("data", {})),
        objective=ObjectiveOptions(**sections.get("objective", {})),
        training=TrainingOptions(**usual | options),
    )


def config_alone(folder: Path, **changes) -> Path:
    config = tiny_config(**changes)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def no_step_peaks(monkeypatch):
    """No step without numbers, where it is not the point."""
    monkeypatch.setattr(peak_bytes, "step_peaks", lambda *_: {"forward": 1})


# Agreement with the real run


@pytest.mark.parametrize("granularity", ["token", "message"])
def test_parameters_and_steps_match_the_real_run(no_step_peaks, granularity, checkpoint, chats, tmp_path):
    memory = {"granularity": granularity, "delta_init": "base_slice"}
    recipe = make_recipe(checkpoint, tmp_path / "adapter", chats, epochs=2.0, gradient_accumulation=2, memory=memory)
    plan = dry_run(recipe)
    assert listing(tmp_path) == {}
    result = train(recipe)
    assert (plan.trained_parameters, plan.steps) == (result.parameters, result.steps) == (plan.trained_parameters, 4)
    step, model, _ = step_model(recipe)
    assert plan.base_parameters == sum(weight.numel() for weight in base_parameters(model))
    assert plan.memory_bytes == step.adapter.empty_memory(1).nbytes
    assert plan.share == plan.trained_parameters / plan.base_parameters
    assert plan.epochs == 2 and plan.notes == [] and not plan.is_sample


@pytest.mark.parametrize("supervise", ["last", "all"])
def test_data_statistics_match_the_real_run(no_step_peaks, supervise, checkpoint, chats, tokenizer):
    recipe = make_recipe(checkpoint, path=chats, gradient_accumulation=2, data={"supervise": supervise})
    plan = dry_run(recipe)
    data = run_data(recipe, tokenizer, "token", 1)
    assert plan.episodes == data.training.statistics() and plan.episodes.cut == 1
    batches = [[data.training[i] for i in range(len(data.training))][start : start + 4] for start in (0, 4)]
    tokens = [sum(data.collator(batch)[name].sum().item() for name in ("write_mask", "read_mask")) for batch in batches]
    assert plan.steps == 2 and plan.tokens_per_step == pytest.approx(sum(tokens) / 2)


def test_tokens_of_recent_turns_are_counted_by_their_probability(no_step_peaks, checkpoint, chats, tokenizer):
    options = {"data": {"recent_turns": 1}, "objective": {"context_dropout": 0.25}}
    shown, hidden = (
        make_recipe(checkpoint, path=chats, **options | {"objective": {"context_dropout": p}}) for p in (0.0, 1.0)
    )
    most, fewest = dry_run(shown).tokens_per_step, dry_run(hidden).tokens_per_step
    data = run_data(shown, tokenizer, "token", 1)
    whole = data.collator([data.training[i] for i in range(7)])
    assert most * 4 == pytest.approx((whole["write_mask"].sum() + whole["read_mask"].sum()).item())
    assert most > fewest
    between = dry_run(make_recipe(checkpoint, path=chats, **options)).tokens_per_step
    assert between == pytest.approx(0.75 * most + 0.25 * fewest)


def test_generated_dialogues_are_sampled_from_the_whole_run(no_step_peaks, checkpoint, tokenizer, monkeypatch):
    recipe = make_recipe(checkpoint, steps=50, batch_size=4, data={"facts_first": 1, "facts_last": 8, "growth": 1.0})
    seen = []
    own = DialogueEpisodes.__getitem__
    monkeypatch.setattr(DialogueEpisodes, "__getitem__", lambda self, index: seen.append(index) or own(self, index))
    plan = dry_run(recipe)
    assert plan.is_sample and plan.episodes.episodes == len(seen) == 64 and min(seen) == 0 and max(seen) > 190
    assert plan.steps == 50 and plan.epochs is None
    few = make_recipe(checkpoint, steps=3, batch_size=4)
    data = run_data(few, tokenizer, "token", 1)
    batch = data.collator([data.training[i] for i in range(12)])
    tokens = (batch["write_mask"].sum() + batch["read_mask"].sum()).item()
    assert dry_run(few).tokens_per_step == pytest.approx(tokens / 3)


def test_both_parts_of_mixed_episodes_are_sampled(no_step_peaks, checkpoint, chats):
    data = {"path": str(chats), "mix": 0.5, "facts_first": 8, "facts_last": 8, "fewest": 1.0}
    plan = dry_run(make_recipe(checkpoint, steps=64, batch_size=4, data=data))
    assert plan.is_sample and plan.episodes.episodes == 64 and plan.epochs is None
    own = plan.episodes.exchanges - 64  # the seven more of each generated one
    assert own == 7 * 32


def test_steps_are_divided_among_processes(no_step_peaks, checkpoint, chats, monkeypatch):
    alone = dry_run(make_recipe(checkpoint, path=chats))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = dry_run(make_recipe(checkpoint, path=chats))
    assert (alone.steps, result.steps, result.processes, result.is_main) == (4, 2, 2, False)
    assert result.tokens_per_step == pytest.approx(2 * alone.tokens_per_step)


def test_sharded_base_memory_is_divided_among_processes(no_step_peaks, deep_base):
    """Each of eight processes holds an eighth of the deep base. Sizes that eight does not divide are rounded up."""
    alone, shared = dry_run(make_recipe(deep_base)), dry_run(make_recipe(deep_base, shard="fsdp2"), processes=8)
    assert alone.peak.weights == alone.base_bytes == shared.base_bytes
    weights = load_file(deep_base / "model.safetensors")
    assert shared.peak.weights == sum(-(-weight.shape[0] // 8) * weight[0].nbytes for weight in weights.values())
    layer = sum(weight.nbytes for name, weight in weights.items() if ".layers.0." in name)
    head = sum(weights[name].nbytes for name in ("lm_head.weight", "model.norm.weight"))
    assert shared.peak.gathered == 2 * layer + head
    assert shared.peak.total == alone.peak.total - alone.peak.weights + shared.peak.weights + shared.peak.gathered
    assert shared.processes == 8 and shared.is_main


def test_bad_rows_and_missing_files_raise_as_in_training(no_step_peaks, checkpoint, chats, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(chats.read_text() + '{"messages": 3}\n')
    with pytest.raises(DataError):
        dry_run(make_recipe(checkpoint, path=path))
    plan = dry_run(make_recipe(checkpoint, path=path, data={"skip_bad_rows": True}))
    assert plan.skipped_rows == 1 and plan.episodes.episodes == 7
    with pytest.raises(DataError, match="no data file"):
        dry_run(make_recipe(checkpoint, path=tmp_path / "none.jsonl"))


def test_a_run_from_an_adapter_uses_its_memory_options(no_step_peaks, checkpoint, chats, tmp_path):
    first = make_recipe(checkpoint, tmp_path / "first", chats, steps=1, memory={"granularity": "message"})
    parameters = train(first).parameters
    plan = dry_run(dataclasses.replace(first, adapter=str(tmp_path / "first"), memory=DeltaMemConfig()))
    assert plan.trained_parameters == parameters and plan.memory_bytes == dry_run(first).memory_bytes


# Without weights


@pytest.mark.slow
def test_a_config_is_enough_for_parameters_and_memory(checkpoint, tokenizer, chats, tmp_path):
    alone = config_alone(tmp_path / "alone", vocab_size=len(tokenizer))
    plan, full = dry_run(make_recipe(alone, path=Path("nowhere.jsonl"))), dry_run(make_recipe(checkpoint, path=chats))
    same = ("trained_parameters", "base_parameters", "memory_bytes")
    assert [getattr(plan, name) for name in same] == [getattr(full, name) for name in same]
    assert plan.peak.weights == full.peak.weights and plan.peak.total > full.peak.total
    assert plan.episodes is plan.steps is plan.tokens_per_step is None and plan.epochs == 1
    assert len(plan.notes) == 1 and "has no tokenizer" in plan.notes[0]
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("tokenizer*"))


def test_a_tokenizer_without_a_template_raises_as_in_training(tokenizer, tmp_path):
    alone = config_alone(tmp_path)
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    plain.save_pretrained(alone)
    with pytest.raises(ArchitectureError, match="no chat template"):
        dry_run(make_recipe(alone))


# Memory


def test_live_bytes_counts_existing_tensors():
    live = LiveBytes()
    with live:
        live.enter("first")
        tensor = torch.zeros(1000)
        view = tensor[10:]
        (tensor * 2).sum()
        live.enter("second")
        assert live.now == 4000
        del tensor
        assert live.now == 4000
        del view
        assert live.now == 0
        live.enter("third")
    assert live.peaks["first"] >= 8000 and live.peaks["second"] == 4000 and live.peaks["third"] == 0


VARIANTS = {
    "token": {},
    "message": {"memory": {"granularity": "message"}},
    "recomputed": {"gradient_checkpointing": True},
    "in chunks": {"write_chunk": 32, "bptt": 2, "gradient_checkpointing": True},
    "kl": {"objective": {"full_context_kl": 0.1, "write_sparsity": 0.1, "history_kl": 0.1}},
    "unrelated": {"objective": {"unrelated_kl": 0.1}, "data": {"unrelated": "unrelated.jsonl"}},
    "addressing": {"objective": {"addressing": 1.0}},
    "lora": {"lora": LoraOptions(rank=4)},
    "static": {"static": True},
    "static, kl": {"static": True, "objective": {"full_context_kl": 0.1}},
    "recomputed lora": {"lora": LoraOptions(rank=4, dropout=0.1), "gradient_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_memory_matches_a_real_step(variant, deep_base, tokenizer, monkeypatch):
    """The real step computes through all layers; the dry run computes nothing, with three and with four layers."""
    monkeypatch.setattr("deltamem_tool.training.run.read_tokenizer", lambda folder: tokenizer)
    recipe = make_recipe(deep_base, **VARIANTS[variant])
    step, base, _ = step_model(recipe)
    gc.collect()
    with use_implementation("chunked"):
        real = max(step_peaks(step, base, SHAPE).values())
    counts = []
    own = peak_bytes.with_layers
    monkeypatch.setattr(peak_bytes, "with_layers", lambda config, n: counts.append(n) or own(config, n))
    estimated = activation_bytes(recipe, BaseCheckpoint(str(deep_base)), recipe.memory, SHAPE)
    assert counts == [3, 4]
    assert estimated == pytest.approx(real, rel=0.02)


@pytest.mark.slow
def test_memory_saving_options_lower_the_estimate(tmp_path):
    base = config_alone(tmp_path, num_hidden_layers=3, intermediate_size=128)  # so few that one fake step is enough

    def total(**options):
        return dry_run(make_recipe(base, **options)).peak.activations

    usual = total()
    assert total(gradient_checkpointing=True) < 0.7 * usual
    assert total(write_chunk=50, bptt=1) < 0.7 * usual


@pytest.mark.parametrize(("quantize", "width"), [("int8", 1.0), ("nf4", 0.5625)])
def test_quantised_weights_are_counted_at_their_packed_size(no_step_peaks, quantize, width, deep_base):
    plain, packed = (dry_run(make_recipe(deep_base, dtype="bfloat16", quantize=kind)) for kind in ("none", quantize))
    assert plain.peak.weights == 2 * plain.base_parameters
    linear = plain.base_parameters - 2 * 96 * 32 - (2 * LAYERS + 1) * 32 - 2 * LAYERS * 16
    assert packed.peak.weights == pytest.approx(2 * (plain.base_parameters - linear) + width * linear, abs=1)
    assert packed.peak.activations > plain.peak.activations  # one weight is unpacked at a time
    assert dry_run(make_recipe(deep_base)).peak.weights == 4 * plain.base_parameters  # "auto": the config's own


def test_the_total_is_the_sum_and_adam_has_two_moments(no_step_peaks, deep_base):
    plan = dry_run(make_recipe(deep_base, optimizer="sgd"))
    peak = plan.peak
    assert peak.adapter == peak.gradients == peak.optimizer // 2 == 4 * plan.trained_parameters
    assert peak.total == peak.weights + peak.adapter + peak.gradients + peak.optimizer + peak.activations
    assert any("sgd is counted as AdamW" in note for note in plan.notes)


def test_an_unknown_activation_size_is_reported_and_not_zero(deep_base, monkeypatch):
    def data_dependent(*args, **kwargs):
        raise RuntimeError("the model looks at values\nand more")

    monkeypatch.setattr(peak_bytes, "step_peaks", data_dependent)
    plan = dry_run(make_recipe(deep_base))
    assert plan.peak.activations is None and plan.peak.total is None and plan.trained_parameters
    assert "Activations: not computed (RuntimeError: the model looks at values)" in plan.notes


def test_recipes_that_training_rejects_raise(deep_base):
    with pytest.raises(ConfigError, match="LoRA does not fit"):
        dry_run(make_recipe(deep_base, lora=LoraOptions(targets=("nothing",))))


def test_layer_period_finds_the_repeating_pattern():
    def config(**changes):
        return tiny_config("smollm3", **{"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8, **changes})

    assert layer_period(config(no_rope_layers=[1] * 8)) == 1
    assert layer_period(config(no_rope_layers=[1, 1, 1, 0] * 2)) == 4
    assert layer_period(config(no_rope_layers=[1, 1, 1, 1, 1, 1, 1, 0])) == 8
    cut = with_layers(config(no_rope_layers=[1, 1, 1, 0] * 2), 6)
    assert (cut.num_hidden_layers, cut.no_rope_layers) == (6, [1, 1, 1, 0, 1, 1]) and len(cut.layer_types) == 6
    assert BaseCheckpoint("builtin:backbone").from_config(tiny_config()).config.eos_token_id == END != PAD


def test_activations_of_a_memory_in_some_layers_are_counted_for_all(no_step_peaks, deep_base):
    plan = dry_run(make_recipe(deep_base, memory={"layers": "back:2"}))
    assert plan.trained_parameters * LAYERS == dry_run(make_recipe(deep_base)).trained_parameters * 2
    assert any("every layer" in note for note in plan.notes)


# The command


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(checkpoint, chats, tmp_path, monkeypatch, capsys):
    from deltamem_tool.cli.train import command

    monkeypatch.chdir(tmp_path)
    content = {"base": str(checkpoint), "out": "adapter", "data": {"path": str(chats)}, "training": {"batch_size": 2}}
    Path("recipe.yaml").write_text(json.dumps(content))
    before = listing(tmp_path)
    command(["recipe.yaml", "--dry-run", "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {field.name for field in dataclasses.fields(DryRun)}
    assert report["steps"] == 4 and report["episodes"]["write_tokens"]["max"] > 0 and report["peak"]["total"] > 0
    command(["recipe.yaml", "--dry-run", "--set", "training.steps=9"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "memory of a process" in printed and f"{report['trained_parameters']:,}" in printed
    assert listing(tmp_path) == before
