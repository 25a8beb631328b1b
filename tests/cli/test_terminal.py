"""Input typed key by key, through prompt_toolkit's own pipe instead of a terminal."""

from __future__ import annotations

import io
import sys

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from deltamem_tool.chat.repl import COMMANDS
from deltamem_tool.cli import terminal
from deltamem_tool.cli.terminal import CommandCompleter, Reader, history_file

UP, ALT_ENTER, ENTER, CTRL_C, CTRL_D = "\x1b[A", "\x1b\r", "\r", "\x03", "\x04"
PASTE, PASTED = "\x1b[200~", "\x1b[201~"


@pytest.fixture(autouse=True)
def xterm(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def read_keys(tmp_path, monkeypatch):
    """`read_keys(keys)`: the lines that a new reader returns, with the history of the readers before it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal, "create_output", lambda **_: DummyOutput())
    file = tmp_path / "state" / "history"

    def read(keys, history=file):
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_bytes(keys if isinstance(keys, bytes) else keys.encode())
            return Reader(COMMANDS, history).read()

    return read


def test_lines_are_read_with_pastes_and_line_breaks(read_keys):
    assert read_keys(f"Hello.{ENTER}") == "Hello."
    assert read_keys(f"one{ALT_ENTER}two{ENTER}") == "one\ntwo"
    assert read_keys(f"{PASTE}three\r\nlines\nmore{PASTED}{ENTER}") == "three\nlines\nmore"
    assert read_keys(b"caf\xe9\r") == "caf?"  # a terminal that does not speak UTF-8


def test_a_dumb_terminal_gets_no_escape_codes(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    lines = io.BytesIO("Grüße\n/undo\r\n".encode("latin-1"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, "latin-1"))
    reader = Reader(COMMANDS, None)
    assert [reader.read() for _ in range(2)] == ["Grüße", "/undo"]
    with pytest.raises(EOFError):
        reader.read()
    assert capsys.readouterr() == ("", "> " * 3)


def test_commands_and_files_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me.safetensors").touch()

    def completed(text):
        completions = CommandCompleter(COMMANDS).get_completions(Document(text), CompleteEvent())
        return sorted(text[: len(text) + completion.start_position] + completion.text for completion in completions)

    assert completed("/") == sorted(COMMANDS)
    assert completed("/me") == ["/memory"]
    assert completed("/load m") == ["/load me.safetensors"]
    assert completed("/undo m") == completed("m") == completed("") == completed(" /me") == []


def test_ctrl_c_and_ctrl_d(read_keys):
    for keys, empty in ((CTRL_C, True), (f"half a line{CTRL_C}", False)):
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            reader = Reader(COMMANDS, None)
            pipe.send_text(keys)
            with pytest.raises(KeyboardInterrupt):
                reader.read()
            assert reader.was_empty is empty
    with pytest.raises(EOFError):
        read_keys(CTRL_D)


def test_the_history_is_kept_and_private(read_keys, tmp_path):
    read_keys(f"my secret{ENTER}")
    file = tmp_path / "state" / "history"
    assert read_keys(f"{UP}{ENTER}") == "my secret"
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    file.chmod(0o644)  # as another program may leave it
    read_keys(f"more{ENTER}")
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_bytes()
    assert read_keys(f"{UP}nothing{ENTER}", history=None) == "nothing"
    assert file.read_bytes() == before


def test_the_history_is_in_the_state_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "deltamem" / "chat_history"
    (tmp_path / "deltamem").write_text("in the way")
    with pytest.raises(FileExistsError):
        Reader(COMMANDS, history_file())
