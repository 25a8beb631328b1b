"""The record of a run's start, and its entries in the adapter's summary."""

from __future__ import annotations

import dataclasses
import json

import pytest

from deltamem_tool import DeltaMemError
from deltamem_tool.recipe.load import DataOptions, LoraOptions, ObjectiveOptions, Recipe, TrainingOptions
from deltamem_tool.training import train
from deltamem_tool.training.run_folder import RECIPE_FILE, check_run_folder, checkpoint_to_resume, start_of
from deltamem_tool.training.summary import named_recipe

FILES = ("path", "eval_path", "unrelated")


@pytest.fixture
def recipe(tmp_path):
    for name in FILES:
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    return Recipe(
        base="some/model",
        out=str(tmp_path / "adapter"),
        data=DataOptions(**{name: str(tmp_path / f"{name}.jsonl") for name in FILES}),
        objective=ObjectiveOptions(unrelated_kl=1.0),
        training=TrainingOptions(eval_every=1),
    )


def begun_run(folder, start):
    """The folder of a run with a checkpoint."""
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    (checkpoint / "model.safetensors").write_bytes(b"")
    (folder / RECIPE_FILE).write_text(json.dumps(start))
    return checkpoint


@pytest.mark.parametrize("name", FILES)
def test_a_run_resumes_only_with_the_files_it_began_with(name, recipe, tmp_path):
    checkpoint = begun_run(tmp_path / "adapter.run", start_of(recipe, 1))
    assert checkpoint_to_resume(tmp_path / "adapter.run", start_of(recipe, 1)) == checkpoint
    (tmp_path / f"{name}.jsonl").write_text("{}\n{}\n")
    with pytest.raises(DeltaMemError, match=f"sha256 of data.{name} was"):
        checkpoint_to_resume(tmp_path / "adapter.run", start_of(recipe, 1))


def test_the_run_of_a_lora_does_not_resume_as_that_of_a_memory(tmp_path):
    lora = Recipe(base="some/model", out="adapter", lora=LoraOptions(rank=4), training=TrainingOptions(steps=5))
    begun_run(tmp_path / "adapter.run", start_of(lora, 1))
    memory = dataclasses.replace(lora, lora=None)
    with pytest.raises(DeltaMemError, match=r"lora\.rank was 4, is None"):
        checkpoint_to_resume(tmp_path / "adapter.run", start_of(memory, 1))


def test_a_folder_that_is_not_of_a_run_is_left_alone(recipe, tmp_path):
    """Its name is that of the adapter folder with .run, and all that a run finds there is removed."""
    folder = tmp_path / "adapter.run"
    folder.mkdir()
    check_run_folder(folder)
    (folder / ".recipe.json.x1").touch()  # of a run that was killed in its first moment
    check_run_folder(folder)
    (folder / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DeltaMemError, match=r"is not the folder of a run.\nIt has thesis.tex and no recipe.json"):
            train(recipe, overwrite=overwrite)
    assert (folder / "thesis.tex").read_text() == "years of work"
    (folder / RECIPE_FILE).touch()
    check_run_folder(folder)
    (tmp_path / "other.run").touch()
    with pytest.raises(DeltaMemError, match=r"other.run is a file"):
        check_run_folder(tmp_path / "other.run")


def test_a_run_that_did_not_record_a_file_resumes(recipe, tmp_path):
    """Runs of earlier versions recorded the content of data.path alone."""
    start = {key: value for key, value in start_of(recipe, 1).items() if key != "sha256 of data.unrelated"}
    checkpoint = begun_run(tmp_path / "adapter.run", start)
    assert checkpoint_to_resume(tmp_path / "adapter.run", start_of(recipe, 1)) == checkpoint


def test_the_summary_of_a_run_has_no_local_paths(recipe, tmp_path):
    named = named_recipe(dataclasses.replace(recipe, base=str(tmp_path / "base"), adapter=str(tmp_path / "first")))
    assert [named[f"data.{name}"] for name in FILES] == [f"{name}.jsonl" for name in FILES]
    assert str(tmp_path) not in json.dumps(named)
