"""The command `deltamem serve`: keys, memories after a restart, and invalid options."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from contextlib import contextmanager

import httpx2
import openai
import pytest
from cli.command import START, in_a_process

from deltamem_tool.serve.keys import KEY_PREFIX

pytestmark = pytest.mark.server

MODEL = "builtin:adapter"
IN_PYTORCH = MODEL, "--device", "cpu"  # or it would be exported first: see tests/onnx/export/test_shipped.py
TELL, ASK = "My dog is Rex.", "What is my dog's name?"
START_SECONDS = 120
ENDED_BY_SIGTERM = 128 + signal.SIGTERM  # like every command


@contextmanager
def served(folder, *arguments):
    """A server in its own process, and its URL."""
    log = folder / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*START, "serve", *IN_PYTORCH, "--port", "0", *arguments],
            cwd=folder,
            stderr=stderr,
            stdout=subprocess.DEVNULL,
        )
    try:
        yield process, _url(process, log)
    finally:
        process.kill()
        process.wait()


def _url(process, log):
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        match = re.search(r"Serving .* at (http://\S+)/v1", log.read_text())
        if match is not None:
            return match[1]
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_keys_restart_and_shutdown_of_a_server(tmp_path):
    result = in_a_process("serve", "--new-key", "acme", "--api-keys", "keys", cwd=tmp_path)
    key = result.out.strip()
    assert key.startswith(KEY_PREFIX) and key not in (tmp_path / "keys").read_text()
    options = ("--api-keys", "keys", "--store", "sqlite:///store.sqlite", "--model-name", "pets")
    answers = []
    for text in (TELL, ASK):
        with served(tmp_path, *options) as (process, url):
            assert httpx2.get(f"{url}/v1/models").status_code == 401
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
                messages = [{"role": "user", "content": text}]
                answer = client.chat.completions.create(model="pets", messages=messages, user="anna")
                answers.append(answer.choices[0].message.content)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == ENDED_BY_SIGTERM
    assert "Rex" in answers[1]
    log = (tmp_path / "log").read_text()
    assert '"path": "/v1/chat/completions", "status": 200' in log and "Traceback" not in log and "Rex" not in log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "MODEL"),
        ((MODEL, "--host", "0.0.0.0"), "would answer anybody"),
        ((MODEL, "--api-keys", "nowhere"), "does not exist"),
        ((MODEL, "--provider", "cpu"), "--provider"),
        ((MODEL, "--host", "203.0.113.1", "--no-keys"), "cannot listen"),
        (("--new-key", "a b"), "is not a valid tenant name"),
    ],
)
def test_invalid_options_are_rejected_before_anything_is_loaded(deltamem, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    deltamem("serve", *arguments).assert_short_error(words)
    assert not list(tmp_path.iterdir())


def test_a_port_in_use_is_reported(deltamem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        deltamem("serve", MODEL, "--port", other.getsockname()[1]).assert_short_error("cannot listen")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--window", "1000000"), "is too large"),
        (("--store", "mysql://somewhere"), "store's URL is invalid"),
        (("--store", "sqlite:////dev/null/store.sqlite"), "dev/null"),
    ],
)
def test_options_that_do_not_fit_the_model_are_rejected(deltamem, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    deltamem("serve", *IN_PYTORCH, "--port", "0", *arguments).assert_short_error(words)
    assert not list(tmp_path.iterdir())
