"""Where files and folders are written: links are followed, and links that lead in a circle are an error."""

from __future__ import annotations

import pytest

from deltamem_tool.errors import DeltaMemError
from deltamem_tool.io.atomic import check_overwrite, check_writable, folder_whole, resolve


def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert resolve(tmp_path / "link" / "new") == (tmp_path / "real" / "new").resolve()
    with folder_whole(tmp_path / "link", overwrite=True) as staged:
        (staged / "file").write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_text() == "x"


def _write_folder(path):
    with folder_whole(path, overwrite=True):
        raise AssertionError("there is nowhere to write")


@pytest.mark.parametrize("write", [lambda path: check_overwrite(path, True), check_writable, _write_folder])
def test_a_circle_of_links_is_an_error(tmp_path, write):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(DeltaMemError, match="lead in a circle"):
        write(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
