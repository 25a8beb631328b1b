"""The README names every command, and only commands, options and files that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from deltamem_tool.cli import COMMANDS, cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def documented() -> list[list[str]]:
    """Every `deltamem …` line of the README and of the recipes' headers, as words."""
    texts = [README, *(recipe.read_text(encoding="utf-8") for recipe in (ROOT / "recipes").glob("*.yaml"))]
    lines = re.findall(r"(?:^|[`#&|] *)deltamem ([a-z][^`\n|#]*)", "\n".join(texts), flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_every_command_is_documented():
    assert {words[0] for words in documented()} >= set(COMMANDS)


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_documented_commands_exist_with_their_options(words):
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    assert {word for word in words if word.startswith("--")} <= known


def test_documented_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"recipes/[\w.-]+\.(?:yaml|py)", README):
        assert (ROOT / target).exists(), target
