"""Every function that draws a picture writes the format of the file's suffix."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.tiny import listing
from matplotlib.figure import Figure

from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation.report.tables import plot_losses
from deltamem_tool.io.pictures import FORMATS, picture_format, write_picture
from deltamem_tool.memory.plot import plot_difference, plot_memory

# The first bytes of a file of each format.
BEGINS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "jpg": b"\xff\xd8\xff", "jpeg": b"\xff\xd8\xff"}
BEGINS |= {"webp": b"RIFF", "tif": b"II*", "tiff": b"II*", "eps": b"%!PS-Adobe-3.0 EPSF", "ps": b"%!PS"}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_written(tmp_path, kind):
    for name in (f"picture.{kind}", f"picture.{kind.upper()}"):
        write_picture(Figure(figsize=(1, 1)), tmp_path / name, 50)
        assert (tmp_path / name).read_bytes().startswith(BEGINS[kind])


def test_every_plot_follows_the_suffix(tmp_path):
    states = {0: np.ones((1, 2, 2), np.float32)}
    for kind in ("svg", "pdf"):
        path = tmp_path / f"picture.{kind}"
        for draw in (
            lambda path: plot_memory(states, path, "title"),
            lambda path: plot_difference(states, states, path, "title"),
            lambda path: plot_losses([(1, 0.5), (2, 0.25)], path),
        ):
            draw(path)
            assert path.read_bytes().startswith(BEGINS[kind])
            path.unlink()


def test_no_suffix_gives_png_and_an_unknown_one_raises(tmp_path):
    write_picture(Figure(figsize=(1, 1)), tmp_path / "picture", 50)
    assert (tmp_path / "picture").read_bytes().startswith(BEGINS["png"])
    before = listing(tmp_path)
    for name in ("picture.xyz", "picture.pdf.txt", "picture.2024-01"):
        with pytest.raises(ConfigError, match=r"\.png, \.svg"):
            picture_format(name)
        with pytest.raises(ConfigError):
            write_picture(Figure(), tmp_path / name, 50)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
@pytest.mark.parametrize("name", ["caf\udce9", "$x^{", "東京 🦜", "a\tb\nc\x1b[2J", "[b]"])
def test_any_name_can_be_in_a_title(tmp_path, kind, name):
    path = tmp_path / f"picture.{kind}"
    plot_memory({0: np.ones((1, 2, 2), np.float32)}, path, f"Memory: {name}")
    assert path.read_bytes().startswith(BEGINS[kind])
