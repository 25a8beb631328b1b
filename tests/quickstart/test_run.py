"""`deltamem quickstart --fast`, end to end."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.tiny import listing
from helpers.tiny_gguf import tiny_gguf

from deltamem_tool import DeltaMemError
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.evaluation.conditions import CONTROLS
from deltamem_tool.io.names import BACKBONE, resolve_folder
from deltamem_tool.memory.file import read_memory
from deltamem_tool.onnx.export.export import TOLERANCE
from deltamem_tool.quickstart import run as module
from deltamem_tool.quickstart.bases import BASES, SMOLLM2

MIN_RECALL_AT_4 = 0.85  # of the shipped adapter
MAX_CONTROL = 0.05
MIN_AGREEMENT = 199 / 200
SMALL = ("training.batch_size=2", "memory.layers=[3]")  # one layer of memory to trace


@pytest.fixture(scope="module")
def quickstart(quickstart_run):
    report = json.loads((quickstart_run / "run" / "report.json").read_text())
    return quickstart_run, (quickstart_run / "stdout").read_text(), report


def change_recipe(monkeypatch, *changes):
    whole = module.load_recipe
    monkeypatch.setattr(module, "load_recipe", lambda file, own, out: whole(file, [*own, *changes], out))


def change_base(monkeypatch, name, **changes):
    monkeypatch.setitem(BASES, name, replace(BASES[name], **changes))


def test_the_report_shows_recall_and_a_matching_export(quickstart):
    folder, _, report = quickstart
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


def test_the_second_conversation_answers_from_the_file(quickstart):
    _, stdout, report = quickstart
    asked = report["conversation"]["asked"]
    right = sum(entry["answer"] == entry["truth"] for entry in asked)
    assert right >= len(asked) - 1
    assert not any(entry["without_memory"] == entry["truth"] for entry in asked)
    for entry in asked:
        assert entry["answer"] in stdout


def test_pictures_are_png_files(quickstart):
    folder, _, _ = quickstart
    assert (folder / "run" / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_does_not_overwrite_the_first(quickstart, deltamem, monkeypatch):
    folder, _, _ = quickstart
    monkeypatch.chdir(folder)
    before = listing(folder)
    result = deltamem("quickstart", "--fast", "--out", "run")
    result.assert_short_error("already exists", "--overwrite", code=1)
    assert listing(folder) == before


@pytest.mark.slow
def test_the_quickstart_with_training_runs(tmp_path, monkeypatch):
    """Without --fast, with two small steps and fewer episodes."""

    change_recipe(monkeypatch, *SMALL)
    change_base(monkeypatch, BACKBONE, facts=(1,), episodes=10, agreement=(1, 10))
    reports = []
    result = module.quickstart(tmp_path / "run", steps=2, report=lambda *progress: reports.append(progress))
    assert {stage for stage, *_ in reports} == {"patch", "train", "evaluate", "export", "remember"}
    assert set(result.seconds) == {stage for stage, *_ in reports}
    assert result.adapter == tmp_path / "run" / "adapter"
    assert read_adapter(result.adapter).base.name == "builtin:backbone"  # not its path on this machine
    assert result.loss_plot is not None and result.loss_plot.read_bytes().startswith(b"\x89PNG")
    assert {entry.name for entry in (tmp_path / "run").iterdir()} <= module.OWN


@pytest.mark.slow
def test_the_quickstart_runs_on_another_base(tmp_path, monkeypatch):
    """A tiny GGUF file replaces SmolLM2's, and is not expected to remember anything."""
    file = tmp_path / "tiny.gguf"
    tiny_gguf(file, max_position_embeddings=8192)  # a character is a token, nearly
    change_recipe(
        monkeypatch,
        "training.batch_size=2",
        "memory.layers=[1]",
        "data.max_write_tokens=3000",
        "data.max_read_tokens=400",
    )
    few = {"facts": (1,), "episodes": 2, "agreement": (1, 2), "told": 1}
    change_base(monkeypatch, SMOLLM2, fetch=lambda: str(file), **few)
    result = module.quickstart(tmp_path / "run", base=SMOLLM2, steps=1)
    trained = read_adapter(result.adapter)
    assert trained.base.name == str(file) and trained.config.branches == ("v", "o")
    options = ["facts=[1]", "words=natural", "episodes=2", 'form="plain"', 'system=""']
    assert result.arguments == tuple(word for option in options for word in ("--set", option))
    report = json.loads(result.report.read_text())
    assert report["recall"]["metric"] == "contains"
    (asked,) = report["conversation"]["asked"]
    assert asked["is_right"] == (asked["truth"] in asked["answer"])

    taken = module.quickstart(tmp_path / "taken", base=SMOLLM2, adapter=str(result.adapter))
    assert taken.fingerprint == result.fingerprint and taken.loss_plot is None
    assert taken.arguments == result.arguments[:-2]  # `system` belongs to the recipe
    assert json.loads(taken.report.read_text())["recall"]["scores"] == report["recall"]["scores"]


@pytest.mark.slow
def test_interrupted_training_is_resumed(tmp_path, monkeypatch):
    change_recipe(monkeypatch, *SMALL, "training.save_every=1")
    change_base(monkeypatch, BACKBONE, facts=(1,), episodes=10, agreement=(1, 10))

    def interrupt(stage, result, of, note):
        if (stage, result) == ("train", 1):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(DeltaMemError, match="--resume"):
        module.quickstart(tmp_path / "run", steps=4, report=interrupt)
    reports = []
    result = module.quickstart(
        tmp_path / "run", steps=4, resume=True, report=lambda *progress: reports.append(progress)
    )
    resumed = [done for stage, done, *_ in reports if stage == "train"]
    assert resumed[0] > 1 and resumed[-1] == 4
    whole = module.quickstart(tmp_path / "whole", steps=4)
    assert result.fingerprint == whole.fingerprint
    with pytest.raises(DeltaMemError, match="nothing to resume"):
        module.quickstart(tmp_path / "run", steps=4, resume=True)


def test_overwrite_keeps_the_adapter_in_use(tmp_path):
    folder = tmp_path / "run" / "adapter"
    shutil.copytree(resolve_folder("builtin:adapter", None, [], "adapter"), folder)
    before = listing(tmp_path)
    with pytest.raises(DeltaMemError, match="would be removed"):
        module.quickstart(tmp_path / "run", adapter=str(folder), overwrite=True)
    assert listing(tmp_path) == before


@pytest.mark.real_model
@pytest.mark.timeout(1800)
def test_the_quickstart_runs_on_a_published_model(smollm2_gguf, tmp_path, monkeypatch):
    """Two small steps, few questions and two memory layers do not lead to recall yet."""
    change_recipe(monkeypatch, "training.batch_size=2", "memory.layers=[28,29]")
    change_base(monkeypatch, SMOLLM2, facts=(1,), episodes=3, agreement=(1, 2), told=1)
    result = module.quickstart(tmp_path / "run", base=SMOLLM2, steps=2)
    assert read_adapter(result.adapter).base.name == str(smollm2_gguf)
    assert result.max_abs_diff < TOLERANCE
    (asked,) = result.remembered.answers
    assert asked.answer and asked.without_memory


def test_interrupted_training_says_how_to_start_again(tmp_path, monkeypatch):

    def interrupted(recipe, resume, report):
        raise DeltaMemError("Interrupted after step 1 of 2.", "Why.", "Run the same command with --resume to go on.")

    monkeypatch.setattr("deltamem_tool.training.train", interrupted)
    with pytest.raises(DeltaMemError, match="--overwrite") as caught:
        module.quickstart(tmp_path / "run")
    assert "--resume" not in str(caught.value)
    with pytest.raises(DeltaMemError, match="already exists"):
        module.quickstart(tmp_path / "run")


@pytest.mark.parametrize("left", [".onnx.k3j2h1.unfinished", ".adapter.run.x_1a2b", ".memory.safetensors.a1b2c3d4"])
def test_what_a_killed_run_has_left_can_be_overwritten(left, tmp_path, monkeypatch):
    class Cleared(Exception):
        """All checks have passed, and what was there is removed."""

    def patch(*args):
        raise Cleared

    (tmp_path / left).mkdir()
    monkeypatch.setattr(module, "create_adapter", patch)
    with pytest.raises(Cleared):
        module.quickstart(tmp_path, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_overwrite_keeps_foreign_files(tmp_path):

    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DeltaMemError, match=r"thesis.tex"):
        module.quickstart(tmp_path, fast=True, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def chat(folder, *arguments):
    command = [sys.executable, "-m", "deltamem_tool.cli", "chat", "run/onnx", "--memory", "me", *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_chat_in_onnx_runtime_is_remembered_by_the_next(quickstart, tmp_path):
    (tmp_path / "run").symlink_to(quickstart[0] / "run")
    out, err = chat(tmp_path).communicate("By the way, my dog is Bella.\n", timeout=120)
    assert out and "me is new" in err and "Traceback" not in err
    out, err = chat(tmp_path).communicate("What is the name of my dog?\n", timeout=120)
    assert out == "Your dog is Bella.\n" and "me is loaded" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_piped_chat_and_keeps_the_memory(quickstart, tmp_path, number, code):
    (tmp_path / "run").symlink_to(quickstart[0] / "run")
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
