"""Commands print in any encoding of stdout, and use colours only where they are wanted."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli.command import START
from evaluation.reported import evaluation_of
from rich.table import Table

from deltamem_tool import cli
from deltamem_tool.chat.repl import Chat
from deltamem_tool.cli import COMMANDS, console
from deltamem_tool.cli.encoding import replace_unencodable
from deltamem_tool.cli.quickstart import _show
from deltamem_tool.memory.file import StoredMemory, write_memory
from deltamem_tool.memory.heatmap import heat_maps, norm_bars
from deltamem_tool.quickstart.run import Quickstart
from deltamem_tool.quickstart.talk import SecondAnswer, TalkResult

ENCODINGS = ("cp1252", "ascii", "cp437", "shift_jis", "utf-8")
ESCAPE = "\x1b["


class Stream(io.TextIOWrapper):
    """stdout or stderr with an encoding, a terminal or not."""

    def __init__(self, encoding="utf-8", is_terminal=False):
        super().__init__(io.BytesIO(), encoding)
        self._is_terminal = is_terminal

    def isatty(self):
        return self._is_terminal

    def text(self):
        self.flush()
        # click treats ASCII as an unset locale, and prints UTF-8.
        return self.buffer.getvalue().decode("utf-8" if self.encoding == "ascii" else self.encoding)


@pytest.fixture
def run_with_encoding(monkeypatch, tmp_path):
    """`run_with_encoding(encoding, *arguments)`: the exit code and what a command prints on such a stdout."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("old.safetensors", 0.5), ("new.safetensors", 0.75)):
        write_memory(name, StoredMemory({0: np.full((1, 2, 4, 4), value, np.float32)}, {}, "0" * 64))

    def run(encoding, *arguments):
        stream = Stream(encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "argv", ["deltamem", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, stream.text()

    return run


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_help_and_tables_print_in_every_encoding(run_with_encoding, encoding):
    for arguments in ([], *([name] for name in COMMANDS)):
        code, text = run_with_encoding(encoding, *arguments, "--help")
        assert code == 0 and text.startswith("Usage: deltamem")
    assert run_with_encoding(encoding, "architectures")[0] == 0
    assert run_with_encoding(encoding, "inspect", "old.safetensors")[0] == 0
    code, text = run_with_encoding(encoding, "inspect", "old.safetensors", "new.safetensors")
    assert code == 0 and "50.0%" in text and "new.safetensors" in text


def test_characters_missing_in_the_encoding_are_spelt_out(run_with_encoding, monkeypatch):
    assert (
        "old.safetensors -> new.safetensors"
        in run_with_encoding("ascii", "inspect", "old.safetensors", "new.safetensors")[1]
    )
    assert (
        "old.safetensors → new.safetensors"
        in run_with_encoding("utf-8", "inspect", "old.safetensors", "new.safetensors")[1]
    )
    assert "(delta-mem)" in run_with_encoding("cp1252", "--help")[1]
    stream = Stream("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    replace_unencodable()
    print("−0.5 … 你 \udce9", flush=True)
    assert stream.buffer.getvalue() == b"-0.5 ... \\u4f60 \xe9\n"  # a file name that is not UTF-8 is unchanged


def test_the_users_error_handler_is_kept(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors="ignore")
    monkeypatch.setattr(sys, "stdout", stream)
    replace_unencodable()
    assert stream.errors == "ignore"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_chat_prints_in_every_encoding(monkeypatch, encoding):
    stream = Stream(encoding, is_terminal=True)
    monkeypatch.setattr(sys, "stdout", stream)
    replace_unencodable()
    states = {0: np.array([[[0.56, -1.0], [0.25, 0.0]]], np.float32), 7: np.full((1, 2, 2), 0.4, np.float32)}
    out = console._console()
    out.print(norm_bars(states), heat_maps(0, states[0]))
    Chat.__init__(chat := Chat.__new__(Chat), None, None, out=out, notices=out)
    chat._help("")
    text = stream.text()
    assert "layer 7" in text and "/undo" in text and "?" not in text and "\\u" not in text
    if encoding != "utf-8":
        assert "  5 -9" in text  # numbers instead of blocks
    assert ("████" if encoding in ("utf-8", "cp437") else "####") in text


# Colours


def shown(monkeypatch, is_terminal, **environment):
    """The printed table and error message of an output with these properties."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out, err = Stream(is_terminal=is_terminal), Stream(is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(console, "STDERR", console._console(stderr=True))
    table = Table("heading", title="title")
    table.add_row("[dim]dim[/dim]", style="red")
    console._console().print(table)
    monkeypatch.setattr(sys, "argv", ["deltamem", "inspect", "nowhere"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "Error: There is no adapter folder nowhere." in err.text()
    with console.STDERR.status("Loading"):
        pass
    return out.text(), err.text()


def test_colours_are_used_only_in_terminals(monkeypatch):
    assert all(ESCAPE in text for text in shown(monkeypatch, True))
    assert not any("\x1b" in text for text in shown(monkeypatch, False))


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}])
def test_the_environment_can_disable_colours(monkeypatch, environment):
    out, err = shown(monkeypatch, True, **environment)
    assert "\x1b" not in out
    assert "\x1b" not in err.partition("Loading")[0].partition("\x1b[?25l")[0]  # only the animation moves the cursor
    assert not any("\x1b" in text for text in shown(monkeypatch, False, **environment))


def test_a_width_of_zero_counts_as_none(monkeypatch):
    """Some pseudo-terminals have it, and shells pass it on as COLUMNS."""
    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "0")
    console._console().print("a table")
    assert stream.text() == "a table\n"


def test_forced_colours_reach_a_file_and_the_animation_does_not(monkeypatch):
    out, err = shown(monkeypatch, False, FORCE_COLOR="1")
    assert "\x1b[31m" in out and "\x1b[31mError" in err
    assert "\x1b[?25" not in err and "\r" not in err


def stages_shown(monkeypatch, is_terminal):
    monkeypatch.setenv("TERM", "xterm-256color")
    err = Stream(is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(console, "STDERR", console._console(stderr=True))
    with console.stages() as report:
        report("Loading", 0, 0)
        for done in range(3):
            report("Comparing", done, 4)
        console.STDERR.print("Done.")
    return err.text()


def test_progress_stages_are_animated_only_in_terminals(monkeypatch):
    text = stages_shown(monkeypatch, True)
    assert "Loading" in text and "Comparing" in text and "2/4" in text
    assert text.rstrip().endswith("\x1b[2K")  # their lines are cleared at the end
    assert stages_shown(monkeypatch, False) == "Done.\n"


def test_brackets_in_names_and_answers_are_not_markup(monkeypatch):
    """In the quickstart's output, rich would raise an error for `[/b]` and drop `[b]`."""
    out = Path("[b]out[/b]")
    remembered = TalkResult([("Hi [/u].", "[red]")], [SecondAnswer("Who [/q]?", "[a]", "[t]", False, "[/w]")])
    files = [out / name for name in ("adapter", "onnx", "memory", "recall.png", "loss.png", "report.json")]
    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "200")
    _show(Quickstart(*files, 1, 2, evaluation_of(), "", (), 0.0, 1.0, 200, remembered, {}))
    text = stream.text()
    for word in ("[b]out[/b]/adapter", "[b]out[/b]/recall.png", "Hi [/u].", "[red]", "Who [/q]?", "[a] ✗ [t]", "[/w]"):
        assert word in text


@pytest.mark.server
@pytest.mark.parametrize("words", ["inspect nowhere", "inspect builtin:adapter", "run nowhere", "--help"])
def test_no_color_disables_colours_in_a_terminal(tmp_path, words):
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"}
    parent, child = os.openpty()
    with subprocess.Popen(
        [*START, *words.split()], cwd=tmp_path, env=environment, stdin=child, stdout=child, stderr=child
    ) as process:
        os.close(child)
        printed = b""
        try:
            while piece := os.read(parent, 1 << 16):
                printed += piece
        except OSError:  # Linux's error at the end of a terminal's output
            pass
        assert process.wait(60) in (0, 1, 2)
    os.close(parent)
    assert printed and b"\x1b" not in printed
