"""`deltamem serve` as a process: what it refuses, and what is left when it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from contextlib import contextmanager

import httpx2
import openai
import pytest
from cli.command import START, in_a_process

from deltamem_tool.memory.file import memory_from_bytes
from deltamem_tool.serve.keys import KEY_PREFIX
from deltamem_tool.serve.store import MemoryStore

pytestmark = pytest.mark.server

MODEL = "builtin:adapter"
TELL, ASK = "My dog is Rex.", "What is my dog's name?"
START_SECONDS = 120
ENDED_BY_SIGTERM = 128 + signal.SIGTERM  # as every command ends


@contextmanager
def served(folder, *arguments):
    """A server in a process of its own, and where it is."""
    log = folder / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*START, "serve", MODEL, "--port", "0", *arguments], cwd=folder, stderr=stderr, stdout=subprocess.DEVNULL
        )
    try:
        yield process, _url(process, log)
    finally:
        process.kill()
        process.wait()


def _url(process, log):
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"Serving .* at (http://\S+)/v1", log.read_text())
        if found is not None:
            return found[1]
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def ask(url, text, **options):
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **options}
    return httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=120)


@pytest.mark.slow
def test_keys_memories_over_a_restart_and_the_end(tmp_path):
    made = in_a_process("serve", "--new-key", "acme", "--api-keys", "keys", cwd=tmp_path)
    key = made.out.strip()
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


@pytest.mark.slow
def test_what_was_begun_is_answered_when_the_server_is_told_to_end(tmp_path):
    with served(tmp_path) as (process, url):
        body = {"model": MODEL, "messages": [{"role": "user", "content": TELL}], "user": "anna", "stream": True}
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"version": 1' in rest[-2]
        assert process.wait(60) == ENDED_BY_SIGTERM
    store = MemoryStore(f"sqlite:///{tmp_path / 'deltamem-memories.sqlite'}")
    assert store.get("default", "anna").version == 1


@pytest.mark.slow
def test_every_answered_turn_is_stored_when_the_server_is_killed(tmp_path):
    answered, lock, over = Counter(), threading.Lock(), threading.Event()

    def talk(url, user):
        while not over.is_set():
            try:
                answer = ask(url, f"My dog is Rex {time.monotonic_ns()}.", user=user, max_tokens=8)
            except httpx2.TransportError:
                return
            with lock:
                answered[user] = max(answered[user], answer.json()["deltamem"]["version"])

    with served(tmp_path) as (process, url):
        threads = [threading.Thread(target=talk, args=(url, f"user-{n}")) for n in range(8)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + START_SECONDS
        while answered.total() < 60 and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        over.set()
        for thread in threads:
            thread.join()
    assert len(answered) == 8
    store = MemoryStore(f"sqlite:///{tmp_path / 'deltamem-memories.sqlite'}")
    for user, version in answered.items():
        stored = store.get("default", user)
        assert stored.version >= version
        memory_from_bytes(stored.data, user)
    store.close()
    with served(tmp_path) as (_, url):
        assert ask(url, TELL, user="user-0").json()["deltamem"]["version"] > answered["user-0"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "MODEL"),
        ((MODEL, "--host", "0.0.0.0"), "would answer anybody"),
        ((MODEL, "--api-keys", "nowhere"), "does not exist"),
        ((MODEL, "--provider", "cpu"), "--provider"),
        ((MODEL, "--host", "203.0.113.1", "--no-keys"), "cannot listen"),
        (("--new-key", "a b"), "is not a tenant's name"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(deltamem, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    deltamem("serve", *arguments).assert_short_error(words)
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken(deltamem, tmp_path, monkeypatch):
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
def test_what_is_refused_when_the_model_is_there(deltamem, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    deltamem("serve", MODEL, "--port", "0", *arguments).assert_short_error(words)
    assert not list(tmp_path.iterdir())
