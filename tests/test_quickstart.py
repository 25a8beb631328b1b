"""`deltamem quickstart --fast`, whole, as a user runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from cli.command import deltamem  # noqa: F401
from helpers.tiny import listing

from deltamem_tool.evaluation.conditions import CONTROLS
from deltamem_tool.memory.file import read_memory

MIN_RECALL_AT_4 = 0.85  # of the shipped adapter
MAX_CONTROL = 0.05
MIN_AGREEMENT = 199 / 200


@pytest.fixture(scope="module")
def made(quickstart_run):
    report = json.loads((quickstart_run / "run" / "report.json").read_text())
    return quickstart_run, (quickstart_run / "stdout").read_text(), report


def test_report(made):
    folder, _, report = made
    recall = report["recall"]
    at = recall["groups"].index("4 facts")
    assert recall["scores"]["state"][at][0] >= MIN_RECALL_AT_4
    for control in CONTROLS:
        assert max(mean for mean, *_ in recall["scores"][control]) <= MAX_CONTROL, control
    assert recall["scores"]["full_context"][at][0] >= 0.95
    assert report["onnx"]["max_abs_diff"] < 1e-3
    assert report["onnx"]["answer_agreement"] >= MIN_AGREEMENT
    for name in ("onnx_dir", "memory_file"):
        assert (folder / report[name]).exists()
    assert report["adapter_parameters"] > 0 and report["memory_bytes"] > 0
    assert set(report["seconds"]) == {"patch", "evaluate", "export", "remember"}


def test_the_second_conversation_answers_from_the_file(made):
    _, stdout, report = made
    asked = report["conversation"]["asked"]
    right = sum(entry["answer"] == entry["truth"] for entry in asked)
    assert right >= len(asked) - 1
    assert not any(entry["without_memory"] == entry["truth"] for entry in asked)
    for entry in asked:
        assert entry["answer"] in stdout


def test_pictures_are_pictures(made):
    folder, _, _ = made
    assert (folder / "run" / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_does_not_destroy_the_first(made, deltamem, monkeypatch):  # noqa: F811
    folder, _, _ = made
    monkeypatch.chdir(folder)
    before = listing(folder)
    done = deltamem("quickstart", "--fast", "--out", "run")
    done.assert_short_error("already there", "--overwrite", code=1)
    assert listing(folder) == before


@pytest.mark.slow
def test_the_training_path(tmp_path, monkeypatch):
    """Without --fast, two small steps instead of all, fewer episodes, and one layer of memory to trace."""
    from deltamem_tool import quickstart as module
    from deltamem_tool.adapter.folder import read_adapter

    whole_recipe = module.load_recipe
    small = ["training.steps=2", "training.batch_size=2", "memory.layers=[3]"]
    monkeypatch.setattr(module, "load_recipe", lambda file, out: whole_recipe(file, small, out))
    monkeypatch.setattr(module, "FACTS", (1,))
    monkeypatch.setattr(module, "EPISODES", 10)
    monkeypatch.setattr(module, "AGREEMENT_EPISODES", 10)
    told = []
    made = module.quickstart(tmp_path / "run", report=lambda *progress: told.append(progress))
    assert {stage for stage, *_ in told} == {"patch", "train", "evaluate", "export", "remember"}
    assert set(made.seconds) == {stage for stage, *_ in told}
    assert made.adapter == tmp_path / "run" / "adapter"
    assert read_adapter(made.adapter).base.name == "builtin:backbone"  # not where it lies on this machine
    assert made.loss_plot is not None and made.loss_plot.read_bytes().startswith(b"\x89PNG")
    assert {entry.name for entry in (tmp_path / "run").iterdir()} <= module.OWN


def test_interrupted_training_says_how_to_start_again(tmp_path, monkeypatch):
    from deltamem_tool import DeltaMemError
    from deltamem_tool import quickstart as module

    def interrupted(recipe, report):
        raise DeltaMemError("Interrupted after step 1 of 2.", "Why.", "Run the same command with --resume to go on.")

    monkeypatch.setattr("deltamem_tool.training.train", interrupted)
    with pytest.raises(DeltaMemError, match="--overwrite") as caught:
        module.quickstart(tmp_path / "run")
    assert "--resume" not in str(caught.value)
    with pytest.raises(DeltaMemError, match="already there"):
        module.quickstart(tmp_path / "run")


def test_overwrite_spares_what_is_not_ours(tmp_path):
    from deltamem_tool import DeltaMemError
    from deltamem_tool.quickstart import quickstart

    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DeltaMemError, match=r"thesis.tex"):
        quickstart(tmp_path, fast=True, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def chat(folder, *arguments):
    command = [sys.executable, "-m", "deltamem_tool.cli", "chat", "run/onnx", "--memory", "me", *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_chat_in_onnx_runtime_is_remembered_by_the_next(made, tmp_path):
    (tmp_path / "run").symlink_to(made[0] / "run")
    out, err = chat(tmp_path).communicate("By the way, my dog is Bella.\n", timeout=120)
    assert out and "me is new" in err and "Traceback" not in err
    out, err = chat(tmp_path).communicate("What is the name of my dog?\n", timeout=120)
    assert out == "Your dog is Bella.\n" and "me is loaded" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_piped_chat_and_keeps_the_memory(made, tmp_path, number, code):
    (tmp_path / "run").symlink_to(made[0] / "run")
    process = chat(tmp_path, "--temperature", "1e6", "--seed", "7", "--max-new-tokens", "100000")
    try:
        process.stdin.write("By the way, my dog is Bella.\n")
        process.stdin.flush()
        assert process.stdout.read(10)  # an answer that takes some seconds has begun
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code and out and "Traceback" not in err, err
    assert "Stopped. What was said is part of the conversation." in err and "Aborted!" in err
    assert any(state.any() for state in read_memory(tmp_path / "me").states.values())
