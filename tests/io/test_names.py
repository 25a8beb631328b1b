"""File names as typed by users."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltamem_tool.errors import ConfigError
from deltamem_tool.io.names import expand_user, hub_name, short_name


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_user("~/x") == tmp_path / "x" and expand_user("a/~") == Path("a/~")


@pytest.mark.parametrize("name", ["half \ud83d", "a\0b", "~nobody-of-this-name/x"])
def test_an_invalid_file_name_raises(name):
    with pytest.raises(ConfigError, match="is not a valid path"):
        expand_user(name)
    assert expand_user("caf\udce9") == Path("caf\udce9")  # bytes that are not UTF-8, as the command line gives them


@pytest.mark.parametrize(
    ("name", "revision", "file"),
    [
        ("someone/model:tiny.gguf", None, "tiny.gguf"),
        ("someone/model:Q4/Tiny.GGUF", None, "Q4/Tiny.GGUF"),
        ("someone/model@v1:tiny.gguf", "v1", "tiny.gguf"),
        ("someone/model@refs/pr/1:tiny.gguf", "refs/pr/1", "tiny.gguf"),
        ("hf://someone/model:tiny.gguf", None, "tiny.gguf"),
        ("hf://someone/model/tiny.gguf", None, "tiny.gguf"),
    ],
)
def test_the_name_of_a_gguf_file_on_the_hub_is_parsed(name, revision, file):
    hub = hub_name(name)
    assert hub is not None and (hub.id, hub.revision, hub.path_in_repo) == ("someone/model", revision, file)
    assert short_name(hub) == f"someone/model:{file}"


@pytest.mark.parametrize(
    "name",
    ["tiny.gguf", "models/tiny.gguf", "./a:b.gguf", "~/a:b.gguf", "/a/b:c.gguf", "C:\\tiny.gguf", "a:b.gguf"],
)
def test_the_name_of_a_local_gguf_file_is_parsed(name):
    assert hub_name(name) is None


def test_a_local_file_takes_precedence_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "model:tiny.gguf").touch()
    assert hub_name("someone/model:tiny.gguf") is None and hub_name("someone/model:other.gguf") is not None
