"""A recipe is read strictly: what it says is what runs, and what it cannot mean is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltamem_tool import DeltaMemConfig, dialogues
from deltamem_tool.errors import ConfigError
from deltamem_tool.recipe import DataOptions, Recipe, TrainingOptions, load_recipe

WHOLE = """
base: some/model
out: adapter
memory:
  rank: 4
  heads: [q, k]
  layers: [0, 2]
  alpha: 8
data:
  path: chats.jsonl
  max_write_tokens: 100
training:
  steps: 7
  learning_rate: 2e-4
  warmup: 0
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(WHOLE)
    return path


def test_what_it_says_is_what_it_means(recipe):
    read = load_recipe(recipe)
    assert read == Recipe(
        base="some/model",
        out="adapter",
        memory=DeltaMemConfig(rank=4, heads=("q", "k"), layers=(0, 2), alpha=8),
        data=DataOptions(path="chats.jsonl", max_write_tokens=100),
        training=TrainingOptions(steps=7, learning_rate=2e-4, warmup=0.0),
    )
    assert isinstance(read.training.warmup, float)


def test_set_changes_keys(recipe):
    changes = ["training.steps=3", "memory.layers=all", "data.path=null", "revision='7'"]
    read = load_recipe(recipe, [*changes, "training.learning_rate=1e-3", "memory.heads=[o]"], out="other")
    assert (read.training.steps, read.training.learning_rate) == (3, 1e-3)
    assert (read.memory.layers, read.memory.heads, read.memory.rank) == ("all", ("o",), 4)
    assert (read.data.path, read.data.max_write_tokens, read.revision, read.out) == (None, 100, "7", "other")
    assert load_recipe(recipe, ["training.steps=3", "training.steps=5"]).training.steps == 5


def test_set_makes_what_was_not_there(tmp_path):
    (tmp_path / "short.yaml").write_text("base: a\n")
    read = load_recipe(tmp_path / "short.yaml", ["out=b", "memory.rank=2", "data.growth=1"])
    assert (read.memory.rank, read.data.growth, read.training) == (2, 1.0, TrainingOptions())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("trainig.steps=3", r"trainig is not known.*mean training\?"),
        ("training.step=3", r"training.step is not known.*mean training.steps\?"),
        ("data.max_write=3", r"data.max_write is not known.*data.max_write_tokens"),
        ("memory.rnk=3", r"'rnk' is not known.*'rank'"),
        ("xyzzy=3", "xyzzy is not known.*Known here: base, out"),
        ("steps=3", r"steps is not known.*training.steps"),
        ("training.steps=many", "training.steps must be int, not 'many'"),
        ("training.steps=1.5", "training.steps must be int, not 1.5"),
        ("training.steps=true", "training.steps must be int, not True"),
        ("training.learning_rate=fast", "training.learning_rate must be float"),
        ("training.learning_rate=.inf", "training.learning_rate"),
        ("base=7", "base must be str"),
        ("data.path=[a]", "data.path must be"),
        ("training=fast", "training needs keys inside"),
        ("memory=null", "memory needs keys inside"),
        ("base.name=a", "'base' has no keys inside"),
        ("training.steps", "no key=value"),
        ("training.steps=[", "not YAML|no YAML"),
        ("memory.rank=0", "rank must be 1 to 64"),
        ("memory.rank=four", "rank must be 1 to 64, not 'four'"),
        ("memory.heads=5", "heads must be a list"),
        ("memory.heads=q,o", "heads must be a list|heads has"),
        ("memory.heads=[q, q]", "names 'q' twice"),
        ("memory.heads=[x]", "heads has 'x'"),
        ("memory.heads=[[q]]", "heads has"),
        ("memory.layers=3", "layers must be 'all'"),
        ("memory.layers=[]", "layers is an empty list"),
        ("memory.layers=[-1]", "indices from 0"),
        ("memory.alpha=.nan", "alpha must be a positive number"),
        ("memory.alpha=.inf", "alpha must be a positive number"),
        ("memory.update_rule=strange", "update_rule must be one of standard"),
        ("training.steps=0", "training.steps must be 1 or more"),
        ("training.warmup=1.0", "training.warmup"),
        ("training.scheduler=cosinus", "training.scheduler.*cosine"),
        ("data.facts_first=9", "data.facts_first"),
        ("data.facts_last=41", "data.facts_last"),
        ("data.max_write_tokens=0", "data.max_write_tokens"),
        ("data.max_read_tokens=-1", "data.max_read_tokens"),
        ("data.growth=2", "data.growth"),
    ],
)
def test_what_it_cannot_mean_is_named(recipe, change, says):
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        load_recipe(recipe, [change])


def test_the_most_facts_are_the_attributes_there_are(recipe):
    most = len(dialogues.KIND_OF)
    assert load_recipe(recipe, [f"data.facts_last={most}"]).data.facts_last == most
    with pytest.raises(ConfigError, match=f"must be {most} or less"):
        load_recipe(recipe, [f"data.facts_last={most + 1}"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"base: [", "not YAML"),
        (b"- a\n- b\n", "no recipe"),
        (b"text", "no recipe"),
        (b"", "lacks base and out"),
        (b"base: a\n", "lacks out"),
        (b"base: caf\xe9\nout: b\n", "not YAML|UTF-8"),
        (b"1: 2\nbase: a\nout: b\n", "1 is not known"),
        (b"base: !!python/object/apply:os.getcwd []\nout: b\n", "not YAML"),
    ],
)
def test_files_that_are_no_recipe_are_named(tmp_path, content, says):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="There is no recipe"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="There is no recipe"):
        load_recipe(tmp_path)


def test_the_recipes_of_this_repository_hold():
    recipes = [*Path(__file__).parents[1].glob("**/recipes/*.yaml")]
    assert recipes
    for path in recipes:
        load_recipe(path, out="somewhere")


def test_a_preset_and_what_changes_it(recipe):
    recipe.write_text(WHOLE.replace("  rank: 4\n", "  preset: ssw\n  rank: 4\n"))
    memory = load_recipe(recipe).memory
    assert memory == DeltaMemConfig.preset("ssw", rank=4, heads=("q", "k"), layers=(0, 2), alpha=8)
    assert memory.granularity == "message" and memory.delta_init == "base_slice"
    with pytest.raises(ConfigError, match="(?s)no preset 'fast'.*tsw, ssw, msw"):
        load_recipe(recipe, ["memory.preset=fast"])
