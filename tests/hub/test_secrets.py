"""Tokens are never printed or logged, and nothing about this machine is pushed to the Hub."""

from __future__ import annotations

import json
import logging
import platform
import socket
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from fake_hub.faults import answer, lose_answer
from fake_hub.routes import Account
from fake_hub.server import HubServer
from helpers.publishing import adapter_folder, evaluated, onnx_folder, trained
from helpers.tiny import save_checkpoint
from huggingface_hub import constants

REPO = "someone/memory"
CANARIES = (("hf_CANARYcanaryCANARY", "HF_TOKEN"), ("canary-of-another-form", "hf auth login"))
STAGES = {
    "look": "GET /api/models/[^/]+/[^/]+/revision/",
    "create": "POST /api/repos/create",
    "preupload": "POST .*/preupload/",
    "put": "^PUT",
    "commit": "POST .*/commit/",
}


@pytest.fixture(params=CANARIES)
def canary(request, hub: HubServer, monkeypatch) -> str:
    """A token, set in one of the ways that users have."""
    token, how = request.param
    hub.tokens = {token: Account("someone")}
    if how == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        Path(constants.HF_TOKEN_PATH).parent.mkdir(exist_ok=True)
        Path(constants.HF_TOKEN_PATH).write_text(token)
        Path(constants.HF_STORED_TOKENS_PATH).write_text(f"[mine]\nhf_token = {token}\n")
    return token


@pytest.fixture
def log_lines() -> list[str]:
    """All log lines, at every level, except the response headers in httpcore's traces, which the server chooses."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not (record.name.startswith("httpcore2") and "receive_response_headers" in record.getMessage()):
                lines.append(self.format(record))

    keep, loggers = Keep(), [logging.getLogger(), logging.getLogger("huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(keep)
        logger.setLevel(logging.DEBUG)
    yield lines
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(keep)
        logger.setLevel(level)


def refusal(status: int, canary: str):
    """An answer that repeats the token in each part that the client reads."""
    message = f"Who is {canary}? You sent Authorization: Bearer {canary}"
    return answer(status, message, X_Error_Message=message, Retry_After="1", X_Request_Id=canary)


@pytest.mark.slow
def test_a_token_is_sent_only_to_the_hub_and_never_printed(hub, canary, deltamem, tmp_path, log_lines, monkeypatch):
    work = tmp_path / "work"
    folder = evaluated(trained(adapter_folder(work / "adapter")))
    onnx_folder(folder / "onnx")
    monkeypatch.chdir(work)
    outputs = []

    def run(*arguments: object, code: int = 0) -> None:
        done = deltamem(*arguments)
        assert done.code == code, done.err
        outputs.append(done.out + done.err)

    run("push", "adapter", REPO, "--dry-run")
    for stage, match in STAGES.items():
        for status in (401, 403, 409, 413, 429, 500):
            hub.fail(match, refusal(status, canary), times=None)
            run("push", "adapter", REPO, code=1)
            assert "***" in outputs[-1], outputs[-1]  # the answer did contain it
            hub.faults.clear()
            if stage == "create":
                assert not hub.repositories
    hub.fail("/commit/", lose_answer())
    run("push", "adapter", REPO, "--license", "mit")
    run("push", "adapter", REPO, "--json")
    for status in (401, 403, 500):
        hub.fail("GET /api/models/", refusal(status, canary), times=None)
        run("pull", REPO, "--out", "pulled", code=1)
        hub.faults.clear()
    run("pull", REPO, "--out", "pulled", "--json")
    assert not [text for text in [*outputs, *log_lines] if canary in text]
    assert any("authenticated: True" in line for line in log_lines)
    token_files = {Path(constants.HF_TOKEN_PATH), Path(constants.HF_STORED_TOKENS_PATH)}
    for path in [path for path in tmp_path.rglob("*") if path.is_file() and path not in token_files]:
        assert canary.encode() not in path.read_bytes(), path
    _assert_sent_to_the_hub_alone(hub, canary)


def _assert_sent_to_the_hub_alone(hub: HubServer, canary: str) -> None:
    """Checks that the token went to the Hub in its header, and never to the storage, which belongs to someone else."""
    for request in hub.requests:
        headers = {name: value for name, value in request.headers.items() if canary in value}
        assert canary not in request.target and canary.encode() not in request.body
        if request.storage or "complete_multipart" in request.target:
            assert not headers, request.line
        else:
            assert headers == {"authorization": f"Bearer {canary}"}, request.line
    assert {request.storage for request in hub.requests} == {True, False}
    for content in hub.files_at(REPO).values():
        assert canary.encode() not in content


USER, HOST = "zelda-of-this-machine", "the-host-of-zelda"


@pytest.fixture
def private_folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a recognisable path, user and host."""
    home = tmp_path / "home" / USER
    home.mkdir(parents=True)
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, USER)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr(platform, "node", lambda: HOST)
    monkeypatch.chdir(home)
    return home


@pytest.mark.slow
def test_nothing_of_this_machine_is_pushed(hub, private_folder, deltamem, tokenizer, monkeypatch):
    def run(*arguments: object) -> None:
        done = deltamem(*arguments)
        assert done.code == 0, done.err

    monkeypatch.setenv("HF_TOKEN", "hf_write")
    home = private_folder
    save_checkpoint(home / "bases" / "mine", tokenizer, num_hidden_layers=1)
    turns = [{"role": "user", "content": "my dog is Bella."}, {"role": "assistant", "content": "Yes."}] * 2
    (home / "talks.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    recipe = {"base": str(home / "bases" / "mine"), "out": str(home / "adapter"), "data": {"path": "talks.jsonl"}}
    recipe["training"] = {"steps": 2, "batch_size": 1}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run("train", "recipe.yaml")
    run("eval", "adapter", "--set", "facts=[1]", "--set", "episodes=2", "--out", "adapter/evaluation.json")
    run("push", "adapter", REPO, "--base-model", "someone/base")
    run("export", REPO, "--base", home / "bases" / "mine", "--out", home / "adapter" / "onnx")
    run("push", "adapter", REPO, "--base-model", "someone/base")
    files = hub.files_at(REPO)
    assert files.keys() >= {"training.json", "training.png", "evaluation.json", "onnx/model.onnx", "onnx/config.json"}
    telling = [USER, HOST, str(home), str(Path(__file__).parents[2]), "bases/mine", "recipe.yaml"]
    telling += [sysconfig.get_paths()["purelib"], "site-packages", sys.prefix, str(Path.cwd())]
    for word in telling:
        assert not [path for path, content in files.items() if word.encode() in content], word
        for request in hub.requests:
            sent_bytes = f"{request.line} {request.headers}".encode() + request.body
            assert word.encode() not in sent_bytes, f"{word}: {request.line}"
