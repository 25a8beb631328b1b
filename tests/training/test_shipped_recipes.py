"""The recipes of real models run as they are, on bases of their kinds with four tiny layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.processes import together
from helpers.tiny import save_checkpoint
from training.sharded_runs import trained
from training.talks import write_talks

from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.recipe.load import Recipe, load_recipe, shipped_recipe
from deltamem_tool.training import dry_run, train

pytestmark = pytest.mark.slow

KINDS = {"qwen3-4b-instruct": "qwen3", "qwen3-8b": "qwen3", "smollm3-3b": "smollm3", "qwen2.5-72b-instruct": "qwen2"}
LAYERS = {"smollm3": {"no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"] * 4}}


def in_small(model: str, folder: Path, tokenizer) -> Recipe:
    """The recipe of a model with nothing changed but its base and its data."""
    kind = KINDS[model]
    changes = {"num_hidden_layers": 4, **LAYERS.get(kind, {})}
    base = save_checkpoint(folder / "base", tokenizer, name=kind, **changes)
    talks = write_talks(folder / "talks.jsonl")
    path = shipped_recipe(f"{model}-msw.yaml")
    return load_recipe(path, [f"base={base}", f"data.path={talks}"], str(folder / "adapter"))


@pytest.mark.parametrize("model", [name for name in KINDS if "72b" not in name])
def test_a_shipped_recipe_runs_as_planned(model, tmp_path, tokenizer):
    recipe = in_small(model, tmp_path, tokenizer)
    planned = dry_run(recipe)
    result = train(recipe)
    assert (result.parameters, result.steps) == (planned.trained_parameters, planned.steps)
    assert read_adapter(recipe.out).config == recipe.memory


def test_a_shipped_recipe_runs_on_a_sharded_base(tmp_path, tokenizer):
    recipe = in_small("qwen2.5-72b-instruct", tmp_path, tokenizer)
    planned = dry_run(recipe, processes=2)
    together(2, trained, [recipe], tmp_path / "notes")
    note = json.loads((tmp_path / "notes").read_text())
    assert note["share"]["held"] == planned.peak.weights < 0.6 * planned.base_bytes
    assert len(note["losses"]) == planned.steps
    assert read_adapter(recipe.out).config == recipe.memory
