"""`benchmarks/serving.py` end to end, on a tiny model: answers are compared before times."""

from __future__ import annotations

import argparse

import pytest
import serving
from serve.batching.conftest import onnx_engine

COLUMNS = {"one at a time": 4, "3 at once": 4, "the scheduler's": 2, "`engine.step`": 2, "slots": 3, "none": 3}


@pytest.mark.slow
def test_every_table_of_the_serving_benchmark_is_filled(tmp_path_factory, monkeypatch):
    folder = onnx_engine("token", tmp_path_factory).folder
    options = argparse.Namespace(folder=folder, users=3, tokens=4, long=200, repeats=1, threads=1)
    rows = [line.strip("| ").split(" | ") for line in serving.run(options, folder).splitlines() if line[:1] == "|"]
    assert {row[0]: len(row) for row in rows}.items() >= COLUMNS.items()
    monkeypatch.setattr(serving, "all_at_once", lambda scheduler, jobs: serving.one_at_a_time(scheduler, jobs[:1]))
    with pytest.raises(SystemExit, match="answers differ"):
        serving.run(options, folder)
