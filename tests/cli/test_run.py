"""`deltamem run`: what it writes to the memory file, and what it never overwrites."""

from __future__ import annotations

import subprocess

from cli.chatting import ANSWER, ASKED, TOLD
from cli.command import START
from helpers.tiny import listing

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.memory.file import read_memory


def test_a_memory_written_by_another_program_is_kept(working_folder, deltamem, monkeypatch, quickstart_onnx):
    assert deltamem("run", quickstart_onnx, "--prompt", TOLD, "--save-memory", "other").code == 0
    assert deltamem("run", quickstart_onnx, "--prompt", "Hello.", "--save-memory", "me").code == 0
    real = Conversation.generate

    def slow(conversation, *arguments):
        (working_folder / "other").replace(working_folder / "me")
        return real(conversation, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Conversation, "generate", slow)
        result = deltamem("run", quickstart_onnx, "--prompt", "Hi.", "--memory", "me", "--save-memory", "me")
    assert result.code == 1 and result.out.strip() and "me was changed by another program" in result.err
    assert set(listing(working_folder)) == {"me", "me-2"} and read_memory("me").digest() != read_memory("me-2").digest()
    assert deltamem("run", quickstart_onnx, "--prompt", ASKED, "--memory", "me").out == f"{ANSWER}\n"


def test_an_answer_to_a_closed_pipe_is_remembered(working_folder, quickstart_onnx):
    """`deltamem run … | head -c 1` closes the pipe early."""
    words = [*START, "run", quickstart_onnx, "--prompt", TOLD, "--save-memory"]
    subprocess.run([*words, "read"], check=True, capture_output=True)
    with subprocess.Popen([*words, "left"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (1, "")
    assert read_memory("left").digest() == read_memory("read").digest()
