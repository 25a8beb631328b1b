"""A run that was killed or interrupted resumes where it stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from training.short_runs import changed
from training.talks import write_talks

from deltamem_tool import DeltaMemError
from deltamem_tool.adapter.config_file import WEIGHTS_FILE
from deltamem_tool.training import EpisodeModel, train
from deltamem_tool.training import trainer as engine

pytestmark = pytest.mark.slow


def interrupt_after(last):
    """A report callback that raises KeyboardInterrupt after step `last`."""

    def report(step, *_):
        if step == last:
            os.kill(os.getpid(), signal.SIGINT)

    return report


@pytest.mark.parametrize("early_stop", [None, 2])
def test_a_run_killed_while_writing_its_adapter_is_resumed(early_stop, recipe, monkeypatch):
    """Nothing is left to do: no step is done twice, and the best weights are still the best."""
    # 5 steps are no whole epoch, and a constant rate would move the weights with a sixth.
    options = {"steps": 5, "scheduler": "constant", "save_every": 1, "eval_every": 1, "early_stop": early_stop}
    real, calls = engine.outcomes, []

    def no_better(*args):
        calls.append(1)
        factors = torch.tensor([100.0 if len(calls) > 2 else 1.0, 1.0, 1.0, 1.0])
        return {name: sums * factors for name, sums in real(*args).items()}

    if early_stop:  # after the second evaluation nothing is better: the fourth ends the run
        monkeypatch.setattr(engine, "outcomes", no_better)
    whole = train(changed(recipe, **options))
    expected = load_file(f"{recipe.out}/{WEIGHTS_FILE}")
    calls.clear()

    def full(*args):
        raise OSError(28, "No space left on device")

    again = dataclasses.replace(changed(recipe, **options), out=f"{recipe.out}-again")
    monkeypatch.setattr(EpisodeModel, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(again)
    monkeypatch.undo()
    resumed = train(again, resume=True)
    assert (resumed.steps, resumed.losses) == (whole.steps, whole.losses)
    assert whole.steps == (4 if early_stop else 5)
    weights = load_file(f"{again.out}/{WEIGHTS_FILE}")
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_patience_is_restored_on_resume(recipe, monkeypatch):
    """No evaluation is better than the first; one of three is waited for before Ctrl-C, and two after it."""
    real = engine.outcomes
    monkeypatch.setattr(engine, "outcomes", lambda *args: {name: sums * 0 + 1 for name, sums in real(*args).items()})
    run = changed(recipe, steps=40, early_stop=3)

    with pytest.raises(DeltaMemError, match="Interrupted after step 5"):
        train(run, report=interrupt_after(4))
    assert train(run, resume=True).steps == 8


@pytest.mark.parametrize("now", [0.0, 1.0])
def test_an_option_added_after_the_run_counts_as_its_default(now, recipe, tmp_path):
    with pytest.raises(DeltaMemError, match="Interrupted"):
        train(recipe, report=interrupt_after(1))
    file = tmp_path / "adapter.run" / "recipe.json"
    options = json.loads(file.read_text())
    assert options.pop("objective.addressing") == 0.0
    file.write_text(json.dumps(options))
    again = dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, addressing=now))
    if now:
        with pytest.raises(DeltaMemError, match=r"addressing was 0\.0, is 1\.0"):
            train(again, resume=True)
    else:
        assert train(again, resume=True).steps == recipe.training.steps


@pytest.mark.parametrize("what", ["processes", "sha256 of data.path"])
def test_resuming_with_other_options_or_data_raises(what, recipe, tmp_path):
    with pytest.raises(DeltaMemError, match="Interrupted"):
        train(recipe, report=interrupt_after(1))
    if what == "processes":
        file = tmp_path / "adapter.run" / "recipe.json"
        file.write_text(file.read_text().replace('"processes": 1', '"processes": 8'))
    else:
        write_talks(tmp_path / "talks.jsonl", count=25)
    with pytest.raises(DeltaMemError, match=f"(?s)started with other settings.*{what}"):
        train(recipe, resume=True)
