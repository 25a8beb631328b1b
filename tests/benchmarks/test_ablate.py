"""Ablations: which runs are trained, resuming, and the table of results."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from pathlib import Path

import ablation as module
import pytest
import yaml
from ablate import command
from ablation import ADAPTERS, Questions, ablate, plan_jobs
from ablation_plan import read_ablation
from ablation_report import draw, markdown
from ablation_runs import RUNS_FILE, Run
from click.testing import CliRunner

from deltamem_tool.errors import ConfigError, DataError, DeltaMemError
from deltamem_tool.evaluation.conditions import CONTROLS, STATE

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes" / "ablations").glob("*.yaml"))
CENTRE = "ablation"
FEW = Questions((1,), 2)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_ablation_is_valid(file):
    """The file names its command, and no two of its variants are the same run."""
    header = re.match(r"(?:#.*\n)+", file.read_text(encoding="utf-8"))
    assert header is not None
    assert f"#   python benchmarks/ablate.py recipes/ablations/{file.name} --out ablations" in header[0]
    ablation = read_ablation(file)
    keys = {name: one.key for (_, name, _), one in plan_jobs([ablation], [42], (), FEW, Path("out")).items()}
    assert len(set(keys.values())) == len(keys) == len(ablation.variants)
    (reference,) = [variant for variant in ablation.variants if variant.name == ablation.reference]
    shared = file.stem != "strategy"  # it compares whole recipes
    assert not reference.changes and (reference.recipe.stem == CENTRE) == shared


def test_the_documented_file_is_a_valid_ablation(tmp_path):
    text = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    (tmp_path / "gate.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    ablation = read_ablation(tmp_path / "gate.yaml")
    assert ablation.variants[0].changes == ("memory.beta_bias=-4.0",) and ablation.paper == {"-2": 47.97}


@pytest.fixture
def files(tmp_path, checkpoint):
    """Two ablations of one small recipe."""
    recipe = {"base": str(checkpoint), "out": "x", "data": {"facts_first": 1, "facts_last": 2}}
    recipe |= {"memory": {"rank": 2}, "training": {"steps": 1, "batch_size": 2}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    paths = []
    for name, change in (("rank", {"memory.rank": 4}), ("heads", {"memory.branches": ["q"]})):
        content = {"title": f"Of {name}", "recipe": "small.yaml", "variants": {"as it is": None, "other": change}}
        content |= {"reference": "as it is", "paper": {"what": "average", "figures": {"other": 47.5}}}
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(content))
    return paths


def test_shared_runs_are_trained_once_and_stopped_ones_resume(files, tmp_path, monkeypatch):
    make_run, made = module.make_run, []

    def stops(job, questions, report):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append((job.variant.name, job.seed))
        return make_run(job, questions, report)

    plans, out = [read_ablation(file) for file in files], tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(module, "make_run", stops)
        with pytest.raises(KeyboardInterrupt):
            ablate(plans, out, [1], FEW)
    assert made == [("as it is", 1), ("other", 1)]
    assert "as it is" in (out / "heads.md").read_text() and "other" not in (out / "heads.md").read_text()
    with (out / RUNS_FILE).open("ab") as file:
        file.write(b'{"key": "cut in the mid')
    monkeypatch.setattr(module, "make_run", lambda job, *rest: made.append(job.variant.name) or make_run(job, *rest))
    result = ablate(plans, out, [1], FEW, keep_adapters=True)
    runs = result.runs
    assert made[2:] == ["other"] and len(runs) == 3
    assert [job.key for job in result.unkept] == [run.key for run in runs[:2]]  # created before and not reused
    assert [json.loads(line)["key"] for line in (out / RUNS_FILE).read_text().splitlines()] == [run.key for run in runs]
    assert [path.name for path in (out / ADAPTERS).iterdir()] == [runs[2].key]
    assert runs[1].parameters > runs[0].parameters > runs[2].parameters
    assert runs[0].scores.keys() == {STATE, *CONTROLS} and all(len(row) == 1 for row in runs[0].scores.values())
    assert (out / "rank.png").read_bytes().startswith(b"\x89PNG")
    options = ["--out", str(out), "--seeds", "1", "--facts", "1", "--episodes", "2"]
    for more, says in (["--keep-adapters"], True), ([], False):
        printed = CliRunner().invoke(command, [*map(str, files), *options, *more]).stderr
        assert ("No adapter of as it is, seed 1: an earlier command" in printed) == says
        assert (f"the lines with {runs[0].key}, {runs[1].key} from {out / RUNS_FILE}" in printed) == says
    assert len(made) == 3


def test_a_failed_run_is_named(files, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise DeltaMemError("Interrupted after step 1 of 2.", "Why.", "Run the same command with --resume to go on.")

    monkeypatch.setattr(module, "train", interrupted)
    with pytest.raises(DeltaMemError, match="as it is, seed 1: Interrupted") as caught:
        ablate([read_ablation(files[0])], tmp_path / "out", [1], FEW)
    assert "--resume" not in str(caught.value) and "repeat the command" in caught.value.next


def run(name, seed, scores, control=0.0, parameters=10):
    by_condition = {STATE: scores, **{key: [0.0, 0.0] for key in CONTROLS}, "donor_state": [control, control]}
    return Run(
        f"{name}{seed}", seed, [1, 4], 50, by_condition, {}, 9, parameters, 256, 0.5, 3.0, 2.0, 1, {"torch": "2"}, "d"
    )


def test_the_table_gives_means_ranges_and_the_papers_figures(files, tmp_path):
    runs = {
        "as it is": [run("a", 1, [1.0, 0.5], 0.02), run("a", 2, [0.8, 0.3], 0.06)],
        "other": [run("b", 1, [0.26, 0.0])],
    }
    text = markdown(read_ablation(files[0]), runs, ["training.steps=3"], "rank.png")
    (ours,) = [line for line in text.splitlines() if "as it is" in line]
    cells = ["**as it is** (reference)", "1, 2", "0.90<br>0.80–1.00", "0.40<br>0.30–0.50", "0.65<br>0.55–0.75", "0.06"]
    assert ours == f"| {' | '.join(cells)} | 10 | 256 B | 2.0 |  |"
    assert "| **other** | 1 | 0.26 | 0.00 | 0.13 | 0.00 | 10 | 256 B | 2.0 | 47.50 |" in text
    options = "--out DIR --seeds 1,2 --facts 1,4 --episodes 50 --set training.steps=3`"
    assert f"`python benchmarks/ablate.py recipes/ablations/rank.yaml {options}" in text and "50 conversations" in text
    assert statistics.mean([run.mean for run in runs["as it is"]]) == pytest.approx(0.65)
    draw(read_ablation(files[0]), runs, tmp_path / "rank.png")


def test_the_report_lists_all_settings_of_the_runs(files):
    older, newer = run("a", 1, [1.0, 0.5]), run("b", 1, [0.0, 0.5])
    newer = dataclasses.replace(newer, versions={"torch": "3"}, threads=2, device="H100")
    text = markdown(read_ablation(files[0]), {"as it is": [older], "other": [newer, newer]}, [], "rank.png")
    assert text.endswith("torch 2; CPU, threads: 1.\ntorch 3; H100, threads: 2.\n")


def test_changed_data_invalidates_a_run(files, tmp_path):
    recipe, data = tmp_path / "small.yaml", tmp_path / "talks.jsonl"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"data": {"path": str(data)}}))
    keys = []
    for text in ("one", "one", "two"):
        data.write_text(text)
        keys.append({one.key for one in plan_jobs([read_ablation(files[0])], [1], (), FEW, tmp_path).values()})
    assert keys[0] == keys[1] and not keys[0] & keys[2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reference": "nobody"}, "reference names 'nobody'"),
        ({"variants": {"one": {}}}, "variants"),
        ({"variants": {"as it is": {}, "other": 3}}, "variants.other"),
        ({"paper": {"what": "average", "figures": {"third": 1.0}}}, "paper.figures names 'third'"),
        ({"titel": "A"}, "titel"),
        ({"recipe": None}, "recipe"),
    ],
)
def test_an_invalid_ablation_is_named(files, change, says):
    files[0].write_text(yaml.safe_dump({**yaml.safe_load(files[0].read_text()), **change}))
    with pytest.raises(ConfigError, match=r"rank.yaml is not a valid ablation") as caught:
        read_ablation(files[0])
    assert says in caught.value.why


def test_invalid_input_writes_nothing(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "make_run", lambda *_: pytest.fail("nothing is to be trained"))

    def fails(*words):
        result = CliRunner().invoke(command, [*map(str, words), "--out", "out"])
        assert result.exit_code and not Path("out").exists()
        return result

    assert "Ablation nowhere.yaml not found" in str(fails("nowhere.yaml").exception)
    files[0].write_text(files[0].read_text().replace("memory.rank", "memory.rnak"))
    assert "did you mean memory.rank" in str(fails(*files).exception.why)
    assert "is not a list such as 1,2,4" in fails(files[1], "--seeds", "a").output
    assert "has a number twice" in fails(files[1], "--seeds", "1,2,1").output
    assert "It is (0,)" in fails(files[1], "--facts", "0").exception.why
    assert "1 conversation is too few" in str(fails(files[1], "--episodes", "1").exception)
    other = tmp_path / "other" / files[1].name
    other.parent.mkdir()
    other.write_text(files[1].read_text().replace("small.yaml", "../small.yaml"))
    assert "Two ablations are called heads" in str(fails(files[1], other).exception)
    assert "training.seed cannot be set with --set" in str(fails(files[1], "--set", "training.seed=7").exception)
    same = fails(files[1], "--set", "memory.branches=[q]").exception
    assert "as it is and other of heads are the same run" in str(same)
    lora = yaml.safe_load((tmp_path / "small.yaml").read_text()) | {"lora": {"rank": 2}}
    lora.pop("memory")
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(lora))
    ways = yaml.safe_load(files[1].read_text()) | {"recipe": "lora.yaml"}
    (tmp_path / "ways.yaml").write_text(yaml.safe_dump(ways))
    assert "trains a LoRA" in str(fails("ways.yaml").exception)
    with pytest.raises(ConfigError, match=r"A seed is given twice: 1, 2, 1"):
        ablate([read_ablation(files[1])], Path("out"), [1, 2, 1], FEW)
    assert not Path("out").exists()
    Path("kept").mkdir()
    (Path("kept") / RUNS_FILE).write_text('{"key": 1}\n')
    with pytest.raises(DataError, match=r"Line 1 of .* is not a run"):
        ablate([read_ablation(files[1])], Path("kept"), [1], FEW)
