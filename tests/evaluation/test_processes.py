"""`deltamem eval` in several processes writes byte-identical files to a run in one, also when killed and resumed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from evaluation.evaluated import loses_another
from helpers.processes import started
from helpers.tiny import randomise, write_jsonl
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, attach, save_adapter
from deltamem_tool.cli import cli
from deltamem_tool.data import dialogues
from deltamem_tool.evaluation.records import RECORDS_FILE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# --multi_gpu starts several processes even without a GPU; --cpu would start one.
LAUNCH = (
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "-m",
    "deltamem_tool",
)
LIMIT = 60  # seconds in which a process must notice that another one has died
BATCH = "4"  # histories and questions have many lengths, so that the last digits depend on the batch
# The date and duration of a run, and the number of answers that existed before it.
OF_ONE_RUN = re.compile(rb"\d{4}-\d\d-\d\d[T ][\d:]+|[\d.]+ s for \d+ answers( \(.*?\))?|\"(seconds|asked)\": [\d.]+")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint):
    """An adapter, and conversations of many lengths."""
    folder = tmp_path_factory.mktemp("processes")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    randomise(attach(model, DeltaMemConfig(rank=4)))
    save_adapter(model, folder / "adapter")
    talks = []
    for number in range(30):
        answers = [f"My lucky number is {number * turn}." for turn in range(1, 3 + number % 5)]
        talks.append([message for text in answers for message in (dialogues.user(text), dialogues.assistant(text))])
    write_jsonl(folder / "talks.jsonl", talks)
    return folder


def options(report: str) -> list[str]:
    task = ["--task", "perplexity", "--data", "talks.jsonl", "--batch-size", BATCH]
    return ["eval", "adapter", *task, "--report", report, "--json"]


def launched(folder: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    run = [sys.executable, "-m", *LAUNCH, *options("two/report")]
    return subprocess.Popen(run, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen) -> int:
    """Kill a launcher and the processes that it has started; returns the number that were evaluating."""
    started = psutil.Process(process.pid).children(recursive=True)
    evaluating = sum("deltamem_tool" in each.cmdline() for each in started)
    for each in (*started, process):
        each.kill()
    process.communicate()
    return evaluating


def contents(folder: Path) -> dict[str, bytes]:
    """The contents of each file of a report, without the entries that differ between runs."""
    return {path.name: OF_ONE_RUN.sub(b"", path.read_bytes()) for path in folder.iterdir()}


def test_two_processes_killed_and_resumed_match_one(folder, monkeypatch):
    monkeypatch.chdir(folder)
    one = CliRunner().invoke(cli, options("one/report"), prog_name="deltamem")
    assert one.exit_code == 0, one.output
    expected, records = (Path(name) / "report" / RECORDS_FILE for name in ("one", "two"))
    process = launched(folder)
    while not records.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    assert kill(process) == 2
    before = len(records.read_bytes().splitlines())
    assert 0 < before < len(expected.read_bytes().splitlines())  # it was killed in the middle
    process = launched(folder)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    report = json.loads(stdout)  # printed by one process, or it would not be JSON
    assert report["run"]["cost"]["asked"] < report["run"]["cost"]["answers"]
    assert records.read_bytes() == expected.read_bytes()
    actual, whole = (contents(path.parent) for path in (records, expected))
    assert len(actual) == 5 and actual == whole


def test_the_failure_of_a_process_is_reported(folder, tmp_path):
    """The other process names it and says how to continue."""
    records, errors = folder / "lost" / "report" / RECORDS_FILE, tmp_path / "errors"
    with started(2, loses_another, folder, options("lost/report"), errors) as processes:
        while not records.exists():
            assert all(process.is_alive() for process in processes)
            time.sleep(0.01)
        processes[1].kill()
        processes[0].join(LIMIT)
        assert processes[0].exitcode == 0
    message, _, advice = errors.read_text().splitlines()
    assert message == f"Process 1 (pid {processes[1].pid}) of this run has ended."
    assert "goes on from the answers that are there" in advice and records.read_bytes()
