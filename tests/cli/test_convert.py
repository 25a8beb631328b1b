"""`deltamem convert`: both directions on the command line, and short errors."""

from __future__ import annotations

import json
import os

import click
import torch
from helpers.full_disk import small_files
from helpers.parity_cases import FOLDER
from helpers.tiny import listing

from deltamem_tool import cli
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.adapter.reference import convert as reference

CASE = FOLDER / "tsw_qo_qwen3"
ADAPTER, BASE = CASE / "adapter", CASE / "base"


def test_an_adapter_round_trips(working_folder, deltamem):
    result = deltamem("convert", ADAPTER, "--base", BASE, "--out", "ours", "--json")
    assert result.code == 0 and result.err == "", result.err
    report = json.loads(result.out)
    assert report["path"] == "ours" and report["format"] == "deltamem" and report["dtypes"] == ["float32"]
    assert report["parameters"] == read_adapter("ours").num_parameters() and report["base"]["name"] == str(BASE)
    assert json.loads(deltamem("inspect", "ours", "--json").out)["parameters"] == report["parameters"]

    result = deltamem("convert", "ours", "--out", "back", "--to", "reference", "--json")
    assert result.code == 0 and json.loads(result.out)["format"] == "reference", result.err
    for file in (reference.REFERENCE_CONFIG, "deltamem_config.json"):
        assert (working_folder / "back" / file).exists() == (file == reference.REFERENCE_CONFIG)
    config = reference.REFERENCE_CONFIG
    assert (working_folder / "back" / config).read_bytes() == (ADAPTER / config).read_bytes()


def test_the_output_for_people(working_folder, deltamem):
    output = deltamem("convert", ADAPTER, "--base", BASE, "--out", "ours").out
    assert "parameters" in output and "float32" in output and "Next: deltamem inspect ours" in output
    assert "for the reference implementation" in deltamem("convert", "ours", "--out", "back", "--to", "reference").out
    deltamem("convert", ADAPTER, "--base", BASE, "--out", "ours").assert_short_error("--overwrite", code=1)
    assert deltamem("convert", ADAPTER, "--base", BASE, "--out", "ours", "--overwrite").code == 0


def test_the_formats_match_the_library():
    options = {option.name: option for option in cli.cli.get_command(None, "convert").params}
    assert isinstance(options["to"].type, click.Choice)
    assert tuple(options["to"].type.choices) == reference.FORMATS and options["to"].default == "deltamem"


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("trap",)


def test_invalid_input_gives_a_short_error(working_folder, deltamem):
    source = working_folder / "source"
    source.mkdir()
    for file in ADAPTER.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    before = listing(working_folder)
    deltamem("convert", source, "--out", "out").assert_short_error("base model", "--base", code=1)
    deltamem("convert", source).assert_short_error("--out", code=2)
    deltamem("convert", source, "--out", "out", "--to", "peft").assert_short_error("peft", code=2)
    deltamem("convert", "nowhere", "--out", "out").assert_short_error("nowhere", code=1)
    deltamem("convert", BASE, "--base", BASE, "--out", "out").assert_short_error("is not an adapter", code=1)
    deltamem("convert", BASE, "--out", "out", "--to", "reference").assert_short_error("not an adapter folder", code=1)
    weights = source / reference.REFERENCE_WEIGHTS
    torch.save({"a": Hostile()}, weights)
    deltamem("convert", source, "--base", BASE, "--out", "out").assert_short_error("was not loaded", "mkdir", code=1)
    weights.write_bytes(b"")
    deltamem("convert", source, "--base", BASE, "--out", "out").assert_short_error("damaged", code=1)
    assert set(listing(working_folder)) == set(before)


def test_a_full_disk_leaves_no_partial_folder(working_folder, deltamem):
    assert deltamem("convert", ADAPTER, "--base", BASE, "--out", "ours").code == 0
    before = listing(working_folder)
    with small_files(2000):
        result = deltamem("convert", "ours", "--to", "reference", "--out", "back")
    result.assert_short_error("disk is full", "half-written", code=1)
    assert listing(working_folder) == before
