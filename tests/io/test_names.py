"""Names of files that people type."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltamem_tool.errors import ConfigError
from deltamem_tool.io.names import expand_user


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_user("~/x") == tmp_path / "x" and expand_user("a/~") == Path("a/~")


@pytest.mark.parametrize("name", ["half \ud83d", "a\0b", "~nobody-of-this-name/x"])
def test_a_name_that_no_file_can_have(name):
    with pytest.raises(ConfigError, match="is not a path"):
        expand_user(name)
    assert expand_user("caf\udce9") == Path("caf\udce9")  # bytes that are not UTF-8, as the command line gives them
