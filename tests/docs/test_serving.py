"""docs/serving.md and its compose file name existing options and paths."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from sqlalchemy.engine import make_url

from deltamem_tool.cli import cli
from deltamem_tool.serve.openapi import document
from deltamem_tool.serve.server import DRAIN_SECONDS
from deltamem_tool.serve.store.encryption import KEY_VARIABLE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "docs" / "examples" / "compose.yaml").read_text(encoding="utf-8"))
SERVER = COMPOSE["services"]["server"]


def options_of(words: list[str]) -> dict:
    """The options of a `deltamem serve` line, parsed by the command itself."""
    assert words[0] == "serve"
    command = cli.get_command(click.Context(cli), "serve")
    return command.make_context("serve", words[1:]).params


@pytest.mark.parametrize("line", re.findall(r"^deltamem (serve [^#\n]*)", PAGE, flags=re.MULTILINE))
def test_documented_options_exist(line):
    assert options_of(shlex.split(line))


def test_documented_paths_exist():
    paths = set(re.findall(r"(?<=[ `])/(?:v1/[\w/{}]+|\w+)(?=`)", PAGE)) - {"/docs", "/openapi.json"}
    assert {"/ready", "/v1/memories/{id}"} <= paths <= set(document()["paths"])


def test_the_options_of_the_compose_file_are_valid():
    options = options_of(SERVER["command"])
    assert str(options["keys_file"]) in {volume.split(":")[1] for volume in SERVER["volumes"]}
    assert options["model"] in {volume.split(":")[1] for volume in SERVER["volumes"]}
    store, database = make_url(options["store_url"]), COMPOSE["services"]["database"]["environment"]
    assert store.host == "database" and store.username == database["POSTGRES_USER"]
    assert store.database == database["POSTGRES_DB"]
    assert KEY_VARIABLE in SERVER["environment"]
    assert str(options["port"]) in SERVER["ports"][0].split(":")[1]


def test_the_compose_file_leaves_time_for_requests_in_flight():
    assert int(SERVER["stop_grace_period"].removesuffix("s")) > DRAIN_SECONDS
