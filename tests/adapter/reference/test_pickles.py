"""Hostile and damaged pickles raise, and no code in them runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from adapter.reference.adapters import BASE, QUERY, assert_refused, read_tensors

from deltamem_tool import convert
from deltamem_tool.adapter.config_file import WEIGHTS_FILE
from deltamem_tool.adapter.reference.config import REFERENCE_CONFIG
from deltamem_tool.adapter.reference.convert import REFERENCE_WEIGHTS
from deltamem_tool.errors import AdapterError


class Hostile:
    """Creates a file if a reader that runs code in pickles unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def plain_pickle(content, file):
    file.write_bytes(pickle.dumps(content))


def old_torch(content, file):
    torch.save(content, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [plain_pickle, torch.save, old_torch])
@pytest.mark.parametrize("place", ["whole", "beside", "key", "deep"])
def test_a_hostile_pickle_runs_no_code(write, place, reference, tmp_path):
    trap = tmp_path / "trap"
    hostile, tensors = Hostile(trap), read_tensors(reference)
    contents = {
        "whole": hostile,
        "beside": {**tensors, "more": hostile},
        "key": {**tensors, hostile: tensors[QUERY]},
        "deep": {**tensors, QUERY: [[{"x": (hostile,)}]]},
    }[place]
    write(contents, reference / REFERENCE_WEIGHTS)
    assert_refused(reference, tmp_path, "was not loaded", "no code in it was run")
    assert not trap.exists()
    file = reference / REFERENCE_WEIGHTS  # the trap works
    _ = pickle.loads(file.read_bytes()) if write is plain_pickle else torch.load(file, weights_only=False)
    assert trap.is_dir()


def test_the_error_does_not_suggest_loading_the_pickle(reference, tmp_path):
    torch.save({"a": Hostile(tmp_path / "trap")}, reference / REFERENCE_WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        convert(reference, tmp_path / "out", base=BASE)
    assert "mkdir" in str(caught.value) and "weights_only" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_an_environment_variable_does_not_allow_pickles(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"a": Hostile(tmp_path / "trap")}, reference / REFERENCE_WEIGHTS)
    assert_refused(reference, tmp_path, "was not loaded")


def test_damaged_files_raise(reference, tmp_path):
    weights, config = reference / REFERENCE_WEIGHTS, reference / REFERENCE_CONFIG
    whole = weights.read_bytes()
    for damaged in (
        b"",
        b"hello world, this is no pickle",
        pickle.dumps({"a": 1})[:-3],
        whole[: len(whole) // 2],
        whole[:-1],
    ):
        weights.write_bytes(damaged)
        assert_refused(reference, tmp_path, str(weights))
    weights.write_bytes(whole)
    for damaged in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        config.write_bytes(damaged)
        assert_refused(reference, tmp_path, str(config))


def test_weights_in_torchs_older_format_are_read(reference, tmp_path):
    convert(reference, tmp_path / "a", base=BASE)
    old_torch(read_tensors(reference), reference / REFERENCE_WEIGHTS)
    convert(reference, tmp_path / "b", base=BASE)
    assert (tmp_path / "a" / WEIGHTS_FILE).read_bytes() == (tmp_path / "b" / WEIGHTS_FILE).read_bytes()
