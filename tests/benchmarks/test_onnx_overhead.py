"""`benchmarks/onnx_overhead.py` end to end, on one layer: both sides are exported, compared and timed."""

from __future__ import annotations

import re

import onnx_overhead
import pytest
from onnx_overhead import lines, options

RATIO = r"\*\*\d+\.\d{3}\*\* \(\d+\.\d{3}–\d+\.\d{3}; \d+\.\d{3}–\d+\.\d{3}\)"


@pytest.mark.slow
def test_both_sides_of_a_small_model_are_compared_and_timed(tmp_path, monkeypatch):
    sizes = ["--past", "4", "--prefill", "8", "--exports", "1", "--openings", "2", "--repeats", "1"]
    args = options(["--random", "1", "--memories", "tsw", "--precisions", "float32", "--control", "--profile", *sizes])
    report = list(lines(args, tmp_path))
    rows = [line for line in report if line.startswith("| float32 |")]
    assert [row.split(" | ")[1] for row in rows[:2]] == ["builder's, no memory", "TSW on q, o"]
    assert all(re.search(r"\d+\.\d s \| \d+\.\d\d \(.*\) \| .* GB \| \d+ MB \| \d+\.\d\d \|$", row) for row in rows[:2])
    measured = [row.split(" | ")[1:3] for row in rows[2:]]
    calls = ("decode, 4 past", "prefill, 8")
    assert measured == [[name, call] for name in ("builder's, no memory", "TSW on q, o") for call in calls]
    assert all(len(re.findall(RATIO, row)) == 2 for row in rows[2:])
    profiled = "\n".join(report)
    assert profiled.count("× GroupQueryAttention") >= 2  # the builder's decode and prompt
    assert "float32, TSW on q, o, decode, 4 past: " in profiled
    monkeypatch.setattr(onnx_overhead, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="do not compute the same"):
        list(lines(args, tmp_path))
