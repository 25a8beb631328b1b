"""Each example in the docstring of a public name runs, in an empty folder."""

from __future__ import annotations

import doctest
import shutil

import pytest
from helpers.publishing import adapter_folder

import deltamem_tool

NAMES = sorted(set(deltamem_tool.__all__) - {"__version__"})
SLOW = {"OnnxModel", "export_onnx"}  # they trace a graph
ON_THE_HUB = {"pull", "push"}
REPOSITORY = "someone/my-adapter"  # as the examples have it


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which an example runs."""
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def writable_hub(hub, folder, monkeypatch):
    """A Hub to which the user may write, and `my-adapter`, which has not been pushed yet."""
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    adapter_folder(folder / "my-adapter")
    return hub


def run_example(name: str) -> None:
    value = getattr(deltamem_tool, name)
    example = value.__doc__.partition("\n    Example:\n")[2]
    test = doctest.DocTestParser().get_doctest(example, {"__name__": "example"}, name, value.__module__, 0)
    assert test.examples, f"{name} has no example"
    report: list[str] = []
    results = doctest.DocTestRunner().run(test, out=report.append)
    assert results.failed == 0, "".join(report)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NAMES if name not in ON_THE_HUB],
)
def test_the_example_runs(name, folder):
    run_example(name)


def test_the_example_of_push_runs(writable_hub):
    run_example("push")
    assert writable_hub.head(REPOSITORY)


def test_the_example_of_pull_runs(writable_hub, folder):
    deltamem_tool.push("my-adapter", REPOSITORY, license="mit")
    shutil.rmtree("my-adapter")
    run_example("pull")
