"""`deltamem chat` with the shipped model: turns, commands, and the memory file.

`tests/quickstart`, which creates the ONNX folder, tests the chat in ONNX Runtime.
"""

from __future__ import annotations

import io
import os
import re
import signal
from contextlib import contextmanager

import numpy as np
import pexpect
import pytest
from cli.chatting import ANSWER, ASKED, ENDLESS, TOLD, piped, same
from cli.command import START
from helpers.tiny import listing
from rich.console import Console

from deltamem_tool.chat.conversation import Conversation, Sampling
from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.chat.repl import COMMANDS, Chat
from deltamem_tool.memory.file import StoredMemory, read_memory, write_memory
from deltamem_tool.onnx.runtime.engine import OnnxModel

# The command


def test_a_fact_is_recalled_from_the_memory_file(working_folder, deltamem, monkeypatch):
    piped(monkeypatch, f"{TOLD}\n\n{ASKED}\n")
    first = deltamem("chat", "builtin:adapter", "--memory", "me.safetensors")
    assert first.code == 0 and first.out.splitlines()[1:] == [ANSWER]
    assert "me.safetensors is new" in first.err
    kept = read_memory("me.safetensors")
    piped(monkeypatch, ASKED)  # no newline at the end
    second = deltamem("chat", "builtin:adapter", "--memory", "me.safetensors")
    assert (second.code, second.out) == (0, f"{ANSWER}\n") and "me.safetensors is loaded" in second.err
    assert not same(read_memory("me.safetensors"), kept), "a question is remembered too"
    assert set(listing(working_folder)) == {"me.safetensors"}
    piped(monkeypatch, ASKED)
    assert ANSWER not in deltamem("chat", "builtin:adapter").out


def test_failed_lines_set_the_exit_code(working_folder, deltamem, monkeypatch):
    piped(monkeypatch, f"{TOLD}\n/sav me\n/load nowhere\n{ASKED}\n/quit\n{TOLD}\n")
    result = deltamem("chat", "builtin:adapter")
    assert result.code == 1 and result.out.splitlines()[1:] == [ANSWER]  # nothing after /quit
    for words in ("There is no command /sav.", "Did you mean /save?", "The memory file nowhere does not exist."):
        assert words in result.err
    assert "Traceback" not in result.err and listing(working_folder) == {}


def test_stdin_that_is_not_utf_8_gives_a_short_error(working_folder, deltamem, monkeypatch):
    piped(monkeypatch, b"caf\xe9\n")
    deltamem("chat", "builtin:adapter").assert_short_error("stdin is not UTF-8 text", "Convert it", code=1)
    piped(monkeypatch, f"{TOLD}\n{ASKED}\n".encode() + b"caf\xe9\n")
    result = deltamem("chat", "builtin:adapter")
    assert result.code == 1 and ANSWER in result.out  # the lines before it are answered


def test_byte_order_marks_are_ignored(working_folder, deltamem, monkeypatch):
    piped(monkeypatch, f"{TOLD}\n{ASKED}\n/context\n")
    without = deltamem("chat", "builtin:adapter")
    piped(monkeypatch, f"\ufeff{TOLD}\n\ufeff{ASKED}\n\ufeff/context\n")  # like three concatenated files
    assert deltamem("chat", "builtin:adapter") == without and without.code == 0


def test_options_of_the_command_are_used(working_folder, deltamem, monkeypatch):
    piped(monkeypatch, "Hello.\n/context\n")
    result = deltamem("chat", "builtin:adapter", "--window", 64, "--max-new-tokens", 2, "--system", "Be kind.")
    assert result.code == 0 and "of 64" in result.out and "Cut after 2 tokens" in result.err
    assert "messages in view      3" in result.out
    piped(monkeypatch, f"{TOLD}\n{ASKED}\n")
    result = deltamem("chat", "builtin:adapter", "--stop", " is")
    assert result.code == 0 and result.out.endswith("\nYour dog\n") and ANSWER.startswith("Your dog is")


def test_invalid_options_are_rejected_before_the_model_loads(working_folder, deltamem):
    (working_folder / "file").write_text("mine")
    (working_folder / "onnx").mkdir()
    (working_folder / "onnx" / "deltamem_onnx.json").write_text("{}")
    before = listing(working_folder)
    result = deltamem("chat", "nowhere", "--memory", "file/me")
    result.assert_short_error("is not a folder", "Choose another place", code=1)
    deltamem("chat", "nowhere", "--memory", "file").assert_short_error("file is not a memory file", code=1)
    deltamem("chat", "nowhere", "--memory", ".").assert_short_error("is a directory", code=2)
    for option in ("--system", "--stop"):
        deltamem("chat", "nowhere", option, "caf\udce9").assert_short_error(option, "not Unicode text", code=2)
    deltamem("chat", "nowhere", "--provider", "cpu").assert_short_error("--provider", "ONNX folder", code=2)
    for options in (("--base", "there"), ("--trust-remote-code",), ("--device", "cpu")):
        deltamem("chat", "onnx", *options).assert_short_error(options[0], "only for an adapter", code=2)
    deltamem("chat", "builtin:adapter", "--device", "nonsense").assert_short_error("is not a device", code=2)
    deltamem("chat", "onnx").assert_short_error("onnx", code=1)  # a damaged folder is not an adapter
    assert listing(working_folder) == before


def test_a_memory_that_does_not_fit_is_rejected_before_the_first_prompt(working_folder, deltamem, monkeypatch, engine):
    empty = empty_memory(engine)
    write_memory("stranger", StoredMemory(empty.states, {}, "0" * 64))
    write_memory("small", StoredMemory({0: np.zeros((1, 1, 2, 2), np.float32)}, {}, engine.adapter))
    write_memory("two", StoredMemory({i: np.repeat(s, 2, 0) for i, s in empty.states.items()}, {}, engine.adapter))
    before = {path.name: path.read_bytes() for path in working_folder.iterdir()}
    for name, says in (("stranger", "another adapter"), ("small", "does not fit"), ("two", "one conversation")):
        piped(monkeypatch, TOLD)
        deltamem("chat", "builtin:adapter", "--memory", name).assert_short_error(says, code=1)
    assert {path.name: path.read_bytes() for path in working_folder.iterdir()} == before


# Turns and commands


def test_the_memory_command_draws_the_memory(talk):
    chat = talk()
    shown, notice = chat("/memory")
    assert "The memory is empty." in notice and "head" not in shown
    chat(TOLD)
    states = {layer: state[0].astype(np.float64) for layer, state in chat.conversation.memory.states.items()}
    norms = {layer: np.sqrt((state**2).sum()) for layer, state in states.items()}
    strongest, weakest = max(norms, key=norms.get), min(norms, key=norms.get)
    for line, layer in (("/memory", strongest), (f"/memory {weakest}", weakest)):
        shown, notice = chat(line)
        assert notice == "" and f"\nlayer {layer}\n" in shown and "head 3" in shown
        for number, norm in norms.items():
            assert re.search(rf"^layer {number} +{norm:.3g} ", shown, re.MULTILINE)
        assert f"9 is {np.abs(states[layer]).max():.2g};" in shown
    assert "No layer 9 has a memory." in chat("/memory 9")[1]


def test_the_chat_reports_messages_that_left_the_window(talk):
    chat = talk(window=48, max_new_tokens=12)
    answers = [chat(line)[1] for line in (TOLD, "My parrot is Whiskers.", "My exam is Easter.", "Hello.")]
    assert any("2 messages left the window; the memory keeps a trace." in notice for notice in answers)
    context = chat.conversation.context
    shown = chat("/context")[0]
    for value in (f"{context.tokens} of 48", f"view      {context.messages}", f"dropped      {context.dropped}"):
        assert value in shown
    assert context.dropped > 0
    failed = chat("Please remember all of this. " * 20)[1]
    assert "window" in failed and chat.chat.failures == 1 and chat.conversation.context == context


def test_lines_that_start_with_a_slash(talk):
    chat = talk(max_new_tokens=1)
    assert "There is no command /usr/bin." in chat("/usr/bin is full")[1]
    assert chat.conversation.messages == []
    chat("//usr/bin is full")
    assert chat.conversation.messages[0]["content"] == "/usr/bin is full"
    assert "takes no argument" in chat("/undo twice")[1] and len(chat.conversation.messages) == 2
    assert all(name in chat("/help")[0] for name in COMMANDS)
    assert not chat.chat.over
    chat("/quit")
    assert chat.chat.over


def test_control_characters_in_an_answer_are_removed(engine, working_folder):
    file = io.StringIO()
    chat = Chat(Conversation(engine), Sampling(), out=Console(file=file, force_terminal=True))
    chat._write("a\x1b[2Jb\r\x9b2J\tc\n\x07é")
    assert file.getvalue() == "a[2Jb2J\tc\né"


# Saving


def test_a_second_ctrl_c_loses_only_the_turn(talk, monkeypatch):
    chat = talk()
    chat(TOLD)
    memory, context = chat.conversation.memory, chat.conversation.context
    with monkeypatch.context() as patch:
        patch.setattr("deltamem_tool.chat.conversation.answer_rows", _interrupted)
        assert "not part of the conversation" in chat(ASKED)[1]
    assert same(chat.conversation.memory, memory) and chat.conversation.context == context
    assert chat(ASKED)[0] == f"{ANSWER}\n"


def _interrupted(*_):
    raise KeyboardInterrupt


# A terminal


@contextmanager
def in_a_terminal(model, *arguments, cwd):
    """`deltamem chat MODEL` in its own pseudoterminal, killed at the end of the block."""
    environment = {**os.environ, "XDG_STATE_HOME": str(cwd / "state"), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(
        START[0],
        [*START[1:], "chat", str(model), *map(str, arguments)],
        cwd=str(cwd),
        env=environment,
        encoding="utf-8",
        timeout=120,
        dimensions=(40, 100),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which would be ignored under nohup
    )
    try:
        yield child
        child.expect(pexpect.EOF)
        child.wait()
    finally:
        child.close(force=True)


@pytest.fixture
def word_of_the_answer(quickstart_onnx):
    """A word of the endless answer to `TOLD`, which shows that the answer has begun."""
    begins = Conversation(OnnxModel(quickstart_onnx)).generate(TOLD, Sampling(**{**ENDLESS, "max_new_tokens": 20})).text
    return max(re.findall("[A-Za-z]+", begins), key=len)


@pytest.mark.server
def test_ctrl_c_stops_only_the_answer(working_folder, quickstart_onnx, word_of_the_answer):
    options = [word for name, value in ENDLESS.items() for word in (f"--{name.replace('_', '-')}", value)]
    with in_a_terminal(quickstart_onnx, "--memory", "me", *options, cwd=working_folder) as child:
        child.expect("me is new, and written after every turn")
        child.expect("Ctrl-D leaves")
        child.expect("> ")
        before = read_memory(working_folder / "me")
        child.send(f"{TOLD}\r")
        child.expect_exact(word_of_the_answer)
        child.sendintr()
        child.expect("Stopped. What was said is part of the conversation.")
        child.expect("> ")
        child.send("/context\r")
        child.expect("messages in view      2")
        child.expect("> ")
        child.send("half a line\x03")
        child.expect("> ")
        child.send("\x03")
        child.expect("Ctrl-D or /quit leaves.")
        child.expect("> ")
        child.send("\x04")
    assert child.exitstatus == 0
    memory = read_memory(working_folder / "me")
    assert any(state.any() for state in memory.states.values()) and not same(memory, before)
    history = working_folder / "state" / "deltamem" / "chat_history"
    assert f"+{TOLD}" in history.read_text() and "half a line" not in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_chat_in_a_terminal(working_folder, quickstart_onnx, word_of_the_answer, number):
    """Covers the prompt, and an answer, whose turn is remembered."""
    with in_a_terminal(quickstart_onnx, "--memory", "me", cwd=working_folder) as child:
        child.expect("> ")
        child.kill(number)
    assert child.exitstatus == 128 + number and "Traceback" not in child.before
    before = read_memory(working_folder / "me")
    options = [word for name, value in ENDLESS.items() for word in (f"--{name.replace('_', '-')}", value)]
    with in_a_terminal(quickstart_onnx, "--memory", "me", *options, cwd=working_folder) as child:
        child.expect("> ")
        child.send(f"{TOLD}\r")
        child.expect_exact(word_of_the_answer)
        child.kill(number)
    assert child.exitstatus == 128 + number and "Traceback" not in child.before
    assert "What was said is part of the conversation" in child.before and not same(
        read_memory(working_folder / "me"), before
    )
