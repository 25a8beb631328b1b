"""Commands that are started without stdin, stdout or stderr."""

from __future__ import annotations

import subprocess

import pytest
from cli.command import START

from deltamem_tool.io.names import ASSETS


@pytest.mark.parametrize(("closed", "shows"), [("<&-", True), (">&-", False), ("2>&-", True), ("<&- >&- 2>&-", False)])
def test_commands_work_with_closed_streams(tmp_path, closed, shows):
    def inspect(path):
        words = ["sh", "-c", f'exec "$@" {closed}', "sh", *START, "inspect", path, "--json"]
        return subprocess.run(words, capture_output=True, text=True)

    result = inspect(ASSETS / "adapter")
    assert (result.returncode, result.stderr, bool(result.stdout)) == (0, "", shows)
    result = inspect(tmp_path / "nowhere")
    assert result.returncode == 1 and "Traceback" not in result.stderr and result.stdout == ""


def test_a_chat_without_streams_remembers(quickstart_onnx, tmp_path):
    command = "echo 'By the way, my dog is Bella.'"
    script = f'{command} | "$@" --memory me >&- 2>&- && "$@" --memory me <&-'
    words = [*START, "chat", quickstart_onnx]
    result = subprocess.run(["sh", "-c", script, "sh", *words], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "") and "me is loaded" in result.stderr


def test_a_reader_that_closes_the_pipe_does_not_lose_the_memory(quickstart_onnx, tmp_path):
    """`| head -c 1` closes the pipe early: the answer is still completed, and the conversation is remembered."""
    from deltamem_tool.memory.file import read_memory

    for memory in ("read", "left"):
        with subprocess.Popen(
            [*START, "chat", quickstart_onnx, "--memory", memory],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            if memory == "left":
                process.stdout.close()
                process.stdout = None
            _, err = process.communicate("By the way, my dog is Bella.\n", timeout=120)
        assert process.returncode == (memory == "left") and "Traceback" not in err, err
    assert read_memory(tmp_path / "left").digest() == read_memory(tmp_path / "read").digest()
