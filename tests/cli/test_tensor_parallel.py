"""Chats and a server on a base sharded over two processes: the first leads and writes files, the other follows."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import httpx2
import numpy as np
import pexpect
import pytest
from cli.launched import invoked
from click.testing import CliRunner
from helpers.processes import started, together
from memory.test_tensor_parallel import PROCESSES, TOLERANCE, make

from deltamem_tool.cli import cli
from deltamem_tool.memory.file import read_memory

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIMIT = 60  # seconds in which all processes must end
LINES = "My dog is Rex.\nWhat is the name of my dog?\n/undo\n/memory 0\n/context\n"
SAMPLING = ["--temperature", "0.8", "--seed", "4", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("shared"), "qwen3")


def chat(folder: Path, device: str) -> list[str]:
    return ["chat", str(folder / "adapter"), "--device", device, "--memory", str(folder / f"{device}.me"), *SAMPLING]


def test_a_chat_on_two_processes_matches_one(folder):
    """They end when the input of the first one ends."""
    together(PROCESSES, invoked, chat(folder, "tp"), LINES, folder / "said")
    one = CliRunner().invoke(cli, chat(folder, "cpu"), input=LINES, prog_name="deltamem")
    assert [(folder / f"said-{number}").read_text() for number in range(PROCESSES)] == [one.stdout, ""]
    expected, actual = (read_memory(folder / f"{device}.me") for device in ("cpu", "tp"))
    for layer, state in expected.states.items():
        np.testing.assert_allclose(actual.states[layer], state, atol=TOLERANCE, rtol=0)


@pytest.mark.server
def test_ctrl_c_ends_all_processes(folder):
    """torchrun then ends its processes, so the conversation so far must be in the memory file before that."""
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    endless = ["--temperature", "1e6", "--max-new-tokens", "100000", "--seed", "7", "--no-history"]
    command = ["torch.distributed.run", "--nproc-per-node", str(PROCESSES), "--standalone", "-m", "deltamem_tool"]
    arguments = ["-m", *command, *chat(folder, "tp"), *endless]
    (folder / "tp.me").unlink(missing_ok=True)
    with pexpect.spawn(sys.executable, arguments, env=environment, timeout=200, encoding="utf-8") as terminal:
        terminal.expect("Ctrl-C stops an answer and leaves")
        before = read_memory(folder / "tp.me").digest()
        terminal.send("My dog is Rex.\r")
        terminal.expect("Rex[^>]*[a-z]{3}[^>]*[a-z]{3}")  # it answers
        terminal.sendintr()
        terminal.expect("Stopped. What was said is part of the conversation.", timeout=LIMIT)
        terminal.expect(pexpect.EOF, timeout=LIMIT)
    assert read_memory(folder / "tp.me").digest() != before


@pytest.mark.server
def test_a_server_on_two_processes_answers_like_one(folder, tmp_path):
    answers = {}
    for device, count in (("tp", PROCESSES), ("cpu", 1)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        store = f"sqlite:///{tmp_path / device}.sqlite"
        serve = [
            "serve",
            str(folder / "adapter"),
            "--device",
            device,
            "--port",
            str(port),
            "--store",
            store,
            "--model-name",
            "any",
        ]
        client = httpx2.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=LIMIT)
        with started(count, invoked, [*serve, "--model-name", "any"], "", tmp_path / "said") as processes, client:
            while not is_up(client):
                assert all(process.is_alive() for process in processes)
                time.sleep(0.1)
            answers[device] = [told(client, user, text) for user in ("anna", "bob") for text in ("My dog is Rex.", "?")]
            os.kill(processes[0].pid, signal.SIGTERM)
            for process in processes:
                process.join(LIMIT)
        codes = [process.exitcode for process in processes]
        assert codes == [128 + signal.SIGTERM, *[0] * (count - 1)]
    assert answers["tp"] == answers["cpu"]


def is_up(client: httpx2.Client) -> bool:
    try:
        return client.get("/models").is_success
    except httpx2.TransportError:
        return False


def told(client: httpx2.Client, user: str, text: str) -> str:
    body = {"model": "any", "user": user, "messages": [{"role": "user", "content": text}], "max_tokens": 6}
    answer = client.post("/chat/completions", json={**body, "temperature": 0})
    answer.raise_for_status()
    return answer.json()["choices"][0]["message"]["content"]
