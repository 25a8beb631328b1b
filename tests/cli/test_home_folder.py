"""A `~` is expanded wherever a path can be given; a shell does not expand it in `--out=~/adapter` or in a recipe."""

from __future__ import annotations

import json
import shutil

import click
import numpy as np
import pytest
from helpers.tiny import listing

import deltamem_tool as deltamem_package
from deltamem_tool import cli
from deltamem_tool.cli.options import UserPath
from deltamem_tool.data.sources import read_episodes, read_rows
from deltamem_tool.errors import ConfigError, DeltaMemError
from deltamem_tool.io.names import ASSETS
from deltamem_tool.memory.file import StoredMemory, read_memory, write_memory
from deltamem_tool.onnx.locate import find_onnx, is_onnx
from deltamem_tool.recipe.load import DataOptions, Recipe, load_recipe

TALK = {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")] * 2}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and an empty working folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert listing(tmp_path / "here") == {}, "nothing is called ~"


def test_every_path_of_every_command_expands_a_tilde():
    for name in cli.COMMANDS:
        command = cli.cli.get_command(click.Context(cli.cli), name)
        paths = [parameter for parameter in command.params if isinstance(parameter.type, click.Path)]
        assert all(isinstance(parameter.type, UserPath) for parameter in paths), name


def test_commands_expand_a_tilde(home, deltamem):
    shutil.copytree(ASSETS / "backbone", home / "base")
    result = deltamem("patch", "~/base", "--out=~/fresh", "--json")
    assert result.code == 0, result.err
    assert json.loads((home / "fresh" / "deltamem_config.json").read_text())["base"]["name"] == str(home / "base")
    assert deltamem("inspect", "~/fresh").code == 0
    deltamem("patch", "~/base", "--out=~/fresh").assert_short_error("already exists", code=1)
    result = deltamem("convert", "builtin:adapter", "--to", "reference", "--out=~/reference")
    assert result.code == 0 and (home / "reference").is_dir()
    assert deltamem("convert", "~/reference", "--base=~/base", "--out=~/converted").code == 0
    deltamem("run", "~/onnx", "--prompt", "a").assert_short_error(str(home / "onnx"), code=1)
    deltamem("compare", "~/a", "~/b").assert_short_error(str(home / "a"), code=1)
    deltamem("train", "~/recipe.yaml").assert_short_error(str(home / "recipe.yaml"), code=1)
    deltamem("patch", "~/base", "--out=~nobody-here/x").assert_short_error("~nobody-here/x is not a valid path", code=1)


def test_recipes_expand_a_tilde(home):
    (home / "talks.jsonl").write_text(json.dumps(TALK) + "\n")
    (home / "recipe.yaml").write_text("base: ~/base\nout: ~/adapter\ndata: {path: ~/talks.jsonl}\n")
    recipe = load_recipe("~/recipe.yaml", ["data.eval_path=~/eval.jsonl", "training.eval_every=1"])
    assert (recipe.base, recipe.out) == (str(home / "base"), str(home / "adapter"))
    assert (recipe.data.path, recipe.data.eval_path) == (str(home / "talks.jsonl"), str(home / "eval.jsonl"))
    assert load_recipe("~/recipe.yaml", out="~/other").out == str(home / "other")
    assert Recipe(base="owner/name", out="./~", data=DataOptions(path="owner/name@main")).out == "./~"
    with pytest.raises(ConfigError, match="out is not a path"):
        load_recipe("~/recipe.yaml", out="~nobody-here/x")


def test_library_functions_expand_a_tilde(home):
    model = deltamem_package.load("builtin:adapter")
    deltamem_package.save_adapter(model, "~/adapter")
    assert deltamem_package.load("~/adapter", base=str(ASSETS / "backbone")) is not None
    memory = StoredMemory({0: np.zeros((1, 1, 2, 2), np.float32)}, {}, "0" * 64)
    write_memory("~/memory", memory)
    assert read_memory("~/memory").digest() == memory.digest()
    (home / "talks.jsonl").write_text(json.dumps(TALK) + "\n")
    assert len(read_episodes("~/talks.jsonl").episodes) == len(read_rows("~/talks.jsonl")) == 1
    assert not is_onnx("~/adapter")
    with pytest.raises(DeltaMemError, match=str(home / "adapter")):
        find_onnx("~/adapter")
