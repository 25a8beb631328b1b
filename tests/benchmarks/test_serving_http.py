"""`benchmarks/serving_http.py` end to end, on a tiny model."""

from __future__ import annotations

import argparse

import pytest
import serving_http
from serve.batching.conftest import onnx_engine

pytestmark = [pytest.mark.slow, pytest.mark.server]

COLUMNS = {"the scheduler alone": 4, "one at a time, plain": 5, "3 at once, OpenAI's client": 5, "8 tokens": 4}


@pytest.mark.parametrize("stored", [0, 100])
def test_every_table_of_the_http_benchmark_is_filled(tmp_path_factory, tmp_path, stored):
    """The empty store without memories is always included."""
    folder = onnx_engine("token", tmp_path_factory).folder
    options = argparse.Namespace(folder=folder, users=3, tokens=4, rounds=1, stored=stored, repeats=1, threads=1)
    report = serving_http.measure(options, folder, tmp_path)
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line[:1] == "|"]
    assert {row[0]: len(row) for row in rows}.items() >= COLUMNS.items()
    assert [row[0] for row in rows[-len({0, stored}) :]] == sorted({"0", str(stored)})
