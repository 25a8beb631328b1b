"""A recipe is read strictly: every key takes effect, and every invalid one is named."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from deltamem_tool import DeltaMemConfig
from deltamem_tool.errors import ConfigError
from deltamem_tool.recipe.load import DataOptions, LoraOptions, ObjectiveOptions, Recipe, TrainingOptions, load_recipe


def test_a_byte_order_mark_is_ignored(recipe):
    read = load_recipe(recipe)
    recipe.write_text("\ufeff" + recipe.read_text().lstrip(), encoding="utf-8")
    assert load_recipe(recipe) == read


def test_every_section_of_a_recipe_is_read(recipe):
    read = load_recipe(recipe)
    assert read == Recipe(
        base="some/model",
        out="adapter",
        memory=DeltaMemConfig(rank=4, branches=("q", "k"), layers=(0, 2), alpha=8),
        data=DataOptions(path="chats.jsonl", max_write_tokens=100),
        training=TrainingOptions(steps=7, learning_rate=2e-4, warmup=0.0),
    )
    assert isinstance(read.training.warmup, float)


def test_set_changes_keys(recipe):
    changes = ["training.steps=3", "memory.layers=all", "data.path=null", "revision='7'"]
    read = load_recipe(recipe, [*changes, "training.learning_rate=1e-3", "memory.branches=[o]"], out="other")
    assert (read.training.steps, read.training.learning_rate) == (3, 1e-3)
    assert (read.memory.layers, read.memory.branches, read.memory.rank) == ("all", ("o",), 4)
    assert (read.data.path, read.data.max_write_tokens, read.revision, read.out) == (None, 100, "7", "other")
    assert load_recipe(recipe, ["training.steps=3", "training.steps=5"]).training.steps == 5


def test_set_adds_missing_keys(tmp_path):
    (tmp_path / "short.yaml").write_text("base: a\n")
    read = load_recipe(tmp_path / "short.yaml", ["out=b", "memory.rank=2", "data.growth=1", "training.steps=9"])
    assert (read.memory.rank, read.data.growth, read.training) == (2, 1.0, TrainingOptions(steps=9))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"base: [", "not YAML"),
        (b"- a\n- b\n", "not a recipe"),
        (b"text", "not a recipe"),
        (b"", "(?s)base is missing.*out is missing"),
        (b"base: a\n", "out is missing"),
        (b"base: caf\xe9\nout: b\n", "not UTF-8"),
        (b"1: 2\nbase: a\nout: b\n", "line 1: 1 is not known"),
        (b"base: a\nout: b\nrevision: 2026-13-01\n", "not YAML"),
        (b"base: a\n? [x, y]\n: 3\n", "not YAML|not known"),
        (b"base: !!python/object/apply:os.getcwd []\nout: b\n", "not YAML"),
    ],
)
def test_files_that_are_not_recipes_raise(tmp_path, content, says):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_missing_recipe_raises(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no recipe .*\nThe file does not exist\.\nPass "):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"There is no recipe .*\nIt is a folder\.\nPass "):
        load_recipe(tmp_path)


MANY = """base: 7
memory:
  rank: 0
  rnk: 3
  branches: [q]
  o_norm: true
steps: 4
data:
  facts_first: 1.5
  facts_last: 90
  max_write: 4
  max_write: 5
objective: {context_dropout: 0.5}
training:
  steps: 4
  epochs: 2
  learning_rate: fast
  early_stop: 3
"""


def test_all_errors_are_reported_together_with_their_lines(tmp_path):
    path = tmp_path / "many.yaml"
    path.write_text(MANY)
    changes = ["training.bptt=0", "training.sead=3", "nothing", "out.name=[", "memory.alpha=-1", "data.growth=[1"]
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, changes)
    assert caught.value.what == f"The recipe {path} is invalid."
    assert caught.value.why.splitlines() == [
        "line 1: base must be text, not 7.",
        "line 3: memory.rank must be 1 or more, not 0.",
        "line 4: memory.rnk is not known: did you mean memory.rank?",
        "line 6: memory.o_norm normalises the correction of o, which is not in memory.branches.",
        "line 7: steps is not known: did you mean training.steps?",
        "line 9: data.facts_first must be a whole number, not 1.5.",
        "line 10: data.facts_last must be 36 or less, not 90.",
        "line 12: data.max_write is given more than once, first in line 11.",
        "line 12: data.max_write is not known: did you mean data.max_write_tokens?",
        "line 13: objective.context_dropout hides recent turns: data.recent_turns must be 1 or more.",
        "line 15: training.steps and training.epochs cannot be combined: leave out one of them.",
        "line 17: training.learning_rate must be a number, not 'fast'.",
        "line 18: training.early_stop counts evaluations: give training.eval_every.",
        "--set training.bptt=0: training.bptt must be 1 or more, not 0.",
        "--set training.sead=3: training.sead is not known: did you mean training.seed?",
        "--set nothing: it is not key=value: write for example --set training.steps=100.",
        "--set out.name=[: its value is not YAML.",
        "--set memory.alpha=-1: memory.alpha must be above 0, not -1.",
        "--set data.growth=[1: its value is not YAML.",
        "out is missing: add it, or pass --out.",
    ]
    assert caught.value.next == "Correct them and try again."


def test_an_invalid_value_is_reported_once(recipe):
    """There is no second error about the default that would replace it."""
    for change in ("data.path=[a]", "training.steps=many"):
        with pytest.raises(ConfigError) as caught:
            load_recipe(recipe, ["training.epochs=null", change])
        assert len(caught.value.why.splitlines()) == 1, caught.value.why
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, ["memory.delta_scale_max=x", "memory.delta_scale_init=5", "memory.beta_bias=y"])
    reasons = caught.value.why
    assert len(reasons.splitlines()) == 2 and "delta_scale_max must be" in reasons and "beta_bias must be" in reasons


def test_an_error_in_a_change_names_the_change_instead_of_a_line(recipe):
    message = "--set training={steps: 0}: training.steps must be 1 or more, not 0."
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, ["training={steps: 0}"])
    assert caught.value.why == message
    with pytest.raises(ConfigError, match="--out: out must not be empty"):
        load_recipe(recipe, out="")
    recipe.write_text(recipe.read_text().replace("steps: 7", "steps: 0"))
    assert load_recipe(recipe, ["training.steps=7"]).training.steps == 7


def test_yaml_merge_keys_are_read(recipe):
    recipe.write_text(recipe.read_text().replace("  path: chats.jsonl\n", "  <<: {path: chats.jsonl, growth: 2}\n"))
    with pytest.raises(ConfigError, match=r"line 9: data.growth must be 1 or less"):
        load_recipe(recipe)
    assert load_recipe(recipe, ["data.growth=1"]).data.path == "chats.jsonl"


@pytest.mark.parametrize("written", ["2e-4", "2E-4", "+2.0e-04", "2.e-4", ".2e-3", "0.0002"])
def test_common_ways_to_write_numbers_are_read(recipe, written):
    assert load_recipe(recipe, [f"training.learning_rate={written}"]).training.learning_rate == 2e-4


def test_default_options_survive_json(recipe):
    """Options survive a round trip through asdict and JSON."""
    read = load_recipe(
        recipe, ["training.scheduler_options={num_cycles: 2, min_lr: 1e-6}", "training.report_to=[wandb]"]
    )
    assert dict(read.training.scheduler_options) == {"num_cycles": 2, "min_lr": 1e-6}
    content = json.loads(json.dumps(dataclasses.asdict(read)))
    content["training"]["scheduler_options"] = dict(content["training"]["scheduler_options"])
    del content["lora"]
    recipe.write_text(json.dumps(content))
    assert load_recipe(recipe) == read and hash(load_recipe(recipe)) == hash(read)
    assert dataclasses.replace(read, out="other") == load_recipe(recipe, out="other") != read


def test_a_recipe_may_train_a_lora_instead_of_a_memory(recipe):
    recipe.write_text("base: a\nout: b\nlora: {rank: 4}\ntraining: {steps: 3}\n")
    assert load_recipe(recipe).lora == LoraOptions(rank=4, alpha=16.0, dropout=0.0, targets=("q_proj", "o_proj"))
    for change, says in [
        ("memory.rank=8", "a memory or a LoRA: leave out lora or memory"),  # although it is the default
        ("adapter=c", "a memory or a LoRA: leave out lora or adapter"),
        ("objective.write_sparsity=0.1", "objective.write_sparsity applies to a memory"),
        ("objective.full_context_kl=0.1", "objective.full_context_kl applies to a memory"),
        ("objective.history_kl=0.1", "objective.history_kl applies to a memory"),
        ("objective.unrelated_kl=0.1", "objective.unrelated_kl applies to a memory"),
        ("data.recent_turns=1", "data.recent_turns applies to a memory"),
    ]:
        with pytest.raises(ConfigError, match=says):
            load_recipe(recipe, [change])
    with pytest.raises(ConfigError, match="leave out lora or memory"):
        Recipe("a", "b", memory=DeltaMemConfig(rank=4), lora=LoraOptions(), training=TrainingOptions(steps=1))


def test_unrelated_data_needs_a_weight_and_vice_versa(recipe):
    recipe.write_text("base: a\nout: b\ntraining: {steps: 3}\n")
    options = ["objective.unrelated_kl=0.5", "data.unrelated=answers.jsonl"]
    read = load_recipe(recipe, options)
    assert (read.objective.unrelated_kl, read.data.unrelated) == (0.5, "answers.jsonl")
    for change in options:
        with pytest.raises(ConfigError, match="give both, or leave out both"):
            load_recipe(recipe, [change])
    with pytest.raises(ConfigError, match=r"objective.unrelated_kl applies to a memory, and static trains none"):
        load_recipe(recipe, [*options, "static=true"])


def test_the_length_of_a_run_is_steps_or_epochs(recipe):
    recipe.write_text("base: a\nout: b\n")
    for changes in [[], ["training.epochs=2"]]:
        with pytest.raises(ConfigError, match=r"without data.path, .* give training.steps or data.path"):
            load_recipe(recipe, changes)
    for changes, expected in [
        ([], (None, None)),
        (["training.epochs=2"], (None, 2.0)),
        (["training.steps=2"], (2, None)),
    ]:
        training = load_recipe(recipe, ["data.path=chats.jsonl", *changes]).training
        assert (training.steps, training.epochs) == expected


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TrainingOptions(steps=0), "training.steps must be 1 or more, not 0"),
        (lambda: TrainingOptions(0), "training.steps must be 1 or more, not 0"),
        (lambda: TrainingOptions(steps=1, epochs=1), "cannot be combined"),
        (lambda: TrainingOptions(stesp=1), "training.stesp is not known: did you mean training.steps"),
        (lambda: DataOptions(facts_first=5, facts_last=4), "must not be greater than data.facts_last"),
        (lambda: ObjectiveOptions(write_target=2), "objective.write_target must be 1 or less"),
        (lambda: LoraOptions(rank=True), "lora.rank must be a whole number, not true"),
        (lambda: LoraOptions(rank=10**18), "lora.rank must be 65536 or less"),
        (lambda: Recipe("a"), "out is missing"),
        (lambda: Recipe("a", "b"), "give training.steps"),
        (lambda: Recipe("a", "b", memory={"rank": 65}), "memory.rank must be 64 or less, not 65"),
        (lambda: Recipe("a", "b", memory={"o_norm": True, "branches": ["q"]}), "memory.o_norm normalises"),
        (lambda: Recipe("a", "b", memory=4), "memory must be a mapping, not 4"),
        (
            lambda: Recipe("a", "b", data=DataOptions("c"), objective=ObjectiveOptions(context_dropout=0.1)),
            "data.recent_turns must be 1 or more",
        ),
    ],
)
def test_options_created_in_python_are_checked(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_options_are_immutable():
    options = TrainingOptions(steps=3, scheduler_options={"b": 1, "a": 2})
    assert options == TrainingOptions(steps=3, scheduler_options={"a": 2, "b": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.steps = 4


def test_reporting_an_error_does_not_import_transformers(recipe):
    """Importing transformers takes seconds, so only unusual names are looked up in it."""
    code = (
        "import sys\nfrom deltamem_tool.recipe.load import load_recipe\n"
        f"try: load_recipe({str(recipe)!r}, ['training.steps=0', 'training.optimizer=adamw_torch'])\n"
        "except ValueError as error: print(error, 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "must be 1 or more" in result.stdout and result.stdout.endswith("False\n")


def test_a_preset_can_be_changed(recipe):
    recipe.write_text(recipe.read_text().replace("  rank: 4\n", "  preset: ssw\n  rank: 4\n"))
    memory = load_recipe(recipe).memory
    assert memory == DeltaMemConfig.preset("ssw", rank=4, branches=("q", "k"), layers=(0, 2), alpha=8)
    assert memory.granularity == "message" and memory.delta_init == "base_slice"
    with pytest.raises(ConfigError, match=r"memory.preset must be one of tsw, ssw, msw, not 'fast'"):
        load_recipe(recipe, ["memory.preset=fast"])


def test_an_option_is_read_under_its_older_name(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: b\nout: o\nmemory:\n  heads: [k]\ntraining: {steps: 1}\n")
    with pytest.warns(FutureWarning, match=r"memory\.heads is now called memory\.branches"):
        assert load_recipe(recipe).memory.branches == ("k",)
    recipe.write_text("base: b\nout: o\nmemory:\n  heads: [x]\ntraining: {steps: 1}\n")
    with pytest.warns(FutureWarning), pytest.raises(ConfigError, match=r"line 4: memory\.branches has 'x'"):
        load_recipe(recipe)
    recipe.write_text("base: b\nout: o\nmemory:\n  heads: [k]\n  branches: [q]\ntraining: {steps: 1}\n")
    with pytest.warns(FutureWarning), pytest.raises(ConfigError, match=r"memory\.heads is the old name"):
        load_recipe(recipe)
