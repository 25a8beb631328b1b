"""Losses of an ablation's variants: trained once, and tabulated."""

from __future__ import annotations

import json
from pathlib import Path

import held_out_loss
import pytest
import yaml
from ablation_plan import read_ablation
from click.testing import CliRunner
from held_out_loss import LOSSES, command

from deltamem_tool.training.run_folder import flat_options

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "recipes" / "ablations" / "smollm2" / "start.yaml"


def test_no_two_variants_of_the_shipped_file_are_the_same_run():
    plan = read_ablation(SHIPPED)
    recipes = [json.dumps(flat_options(variant.load((), 42, "out"))) for variant in plan.variants]
    assert len(set(recipes)) == len(recipes)
    assert [variant.name for variant in plan.variants if not variant.changes] == [plan.reference]


@pytest.mark.slow
def test_every_variant_is_trained_once(checkpoint, tmp_path, monkeypatch):
    data = {"generated": "dialogues", "facts_first": 1, "facts_last": 1}
    recipe = {"base": str(checkpoint), "out": "x", "data": data, "memory": {"rank": 2}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe | {"training": {"steps": 3, "batch_size": 2}}))
    variants = {"as it is": None, "other": {"memory.rank": 4}}
    content = {"title": "Rank", "recipe": "small.yaml", "variants": variants, "reference": "as it is"}
    (tmp_path / "rank.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(held_out_loss, "EPISODES", 2)

    def ran(*options):
        words = [str(tmp_path / "rank.yaml"), "--out", str(tmp_path / "out"), *options]
        result = CliRunner().invoke(command, words, catch_exceptions=False)
        return result.stdout, [json.loads(line) for line in (tmp_path / "out" / "rank.jsonl").read_text().splitlines()]

    printed, runs = ran("--set", "training.steps=2")
    assert [run["variant"] for run in runs] == list(variants)
    assert all(run[name] > 0 for run in runs for name in LOSSES) and runs[0]["parameters"] < runs[1]["parameters"]
    assert printed.strip() == (tmp_path / "out" / "rank.md").read_text().strip()
    monkeypatch.setattr(held_out_loss, "train", None)
    assert ran("--set", "training.steps=2") == (printed, runs)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == []
