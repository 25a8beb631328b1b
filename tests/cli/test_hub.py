"""The commands and the Hub: a Hub id works wherever a folder does, and huggingface_hub's variables are respected.

`export` of a Hub id is in `test_hub_secrets.py`: it takes long enough once.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pexpect
import pytest
import yaml
from cli.command import START, in_a_process
from fake_hub.isolation import environment
from fake_hub.routes import Account
from fake_hub.server import HubServer
from helpers.parity_cases import FOLDER
from helpers.publishing import adapter_folder, onnx_folder

from deltamem_tool import load
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.io.names import ASSETS

BASE, ADAPTER = "someone/base", "someone/adapter"
TOLD, ASKED, ANSWER = "By the way, my dog is Bella.", "What is the name of my dog?", "Your dog is Bella."
TOKENS = {"hf_of_someone": Account("someone")}


@pytest.fixture
def run(hub, deltamem, tmp_path, monkeypatch):
    """Runs a command that must succeed, on a Hub with the shipped backbone as `BASE` and its adapter as `ADAPTER`."""
    monkeypatch.chdir(tmp_path)
    hub.add_repo(BASE, ASSETS / "backbone")
    hub.add_repo(ADAPTER, adapter_folder(tmp_path / "source", BASE, hub.head(BASE)))

    def command(*arguments: object) -> str:
        result = deltamem(*arguments)
        assert result.code == 0, result.err
        return result.out

    return command


def piped(line: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(f"{line}\n".encode()))


def test_a_base_on_the_hub_is_patched(hub, run):
    first = hub.head(BASE)
    hub.add_repo(BASE, {**hub.files_at(BASE), "NOTES.md": b"later"})
    for name, commit in ((BASE, hub.head(BASE)), (f"{BASE}@{first}", first)):
        run("patch", name, "--out", f"adapter-{commit}", "--rank", 2)
        base = read_adapter(f"adapter-{commit}").base
        assert (base.name, base.revision) == (BASE, commit)


def test_an_adapter_on_the_hub_is_used(hub, run, monkeypatch):
    first = hub.head(ADAPTER)
    hub.add_repo(ADAPTER, {"README.md": b"# Gone\n"})
    name = f"{ADAPTER}@{first}"
    report = json.loads(run("inspect", name, "--json"))
    assert report["base"]["name"] == BASE and report["parameters"] == read_adapter(name).num_parameters()
    assert load(name).config.vocab_size == 767
    scores = json.loads(run("eval", name, "--set", "facts=[1]", "--set", "episodes=2", "--json"))
    assert scores["adapter"] == read_adapter(ASSETS / "adapter").fingerprint
    monkeypatch.setattr(sys, "stdin", piped(TOLD))
    run("chat", name, "--memory", "me.safetensors")
    monkeypatch.setattr(sys, "stdin", piped(ASKED))
    assert run("chat", name, "--memory", "me.safetensors") == f"{ANSWER}\n"
    assert {line.split("/")[1] for line in hub.fetched()} == {"base", "adapter"}


def test_a_recipe_may_name_base_and_adapter_on_the_hub(hub, run):
    recipe = {"base": BASE, "adapter": f"{ADAPTER}@{hub.head(ADAPTER)}", "out": "trained"}
    recipe["training"] = {"steps": 1, "batch_size": 1}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    run("train", "recipe.yaml")
    trained = read_adapter("trained")
    assert trained.base.name == BASE and trained.fingerprint != read_adapter(ADAPTER).fingerprint
    assert json.loads(Path("trained/training.json").read_text())["recipe"]["adapter"] == recipe["adapter"]


def test_a_reference_adapter_on_the_hub_is_converted(hub, run):
    case = FOLDER / "tsw_qo_qwen3"
    hub.add_repo("someone/reference", case / "adapter")
    hub.add_repo("someone/its-base", case / "base")
    run("convert", f"someone/reference@{hub.head('someone/reference')}", "--base", "someone/its-base", "--out", "ours")
    base = read_adapter("ours").base
    assert (base.name, base.revision) == ("someone/its-base", hub.head("someone/its-base"))


def test_an_onnx_folder_on_the_hub_is_run(hub, run, quickstart_onnx, monkeypatch):
    graph = {f"onnx/{file.name}": file.read_bytes() for file in quickstart_onnx.iterdir()}
    commit = hub.add_repo("someone/both", {**hub.files_at(ADAPTER), **graph})
    run("run", "someone/both", "--prompt", TOLD, "--save-memory", "me.safetensors")
    assert not [path for path in hub.fetched() if path.endswith("deltamem.safetensors")]
    assert run("run", f"someone/both@{commit}", "--prompt", ASKED, "--memory", "me.safetensors") == f"{ANSWER}\n"
    monkeypatch.setattr(sys, "stdin", piped(ASKED))
    assert run("chat", "hf://someone/both/onnx", "--memory", "me.safetensors") == f"{ANSWER}\n"


@pytest.fixture
def adapter(tmp_path) -> Path:
    folder = adapter_folder(tmp_path / "adapter")
    onnx_folder(folder / "onnx")
    return folder


def test_pushing_without_a_token_asks_to_log_in(hub, deltamem, adapter):
    deltamem("push", adapter, ADAPTER).assert_short_error("token", "hf auth login", "HF_TOKEN", code=1)
    assert not hub.repositories


# Environment variables, in separate processes


@pytest.fixture
def server():
    with HubServer(TOKENS) as server:
        yield server


@pytest.mark.server
def test_a_terminal_prompts_for_a_licence_and_shows_progress(server, adapter, tmp_path):
    """The command finds the server through HF_ENDPOINT, HF_HOME and HF_TOKEN, as `environment` sets them."""
    variables = environment(server, tmp_path / "home", "hf_of_someone") | {"TERM": "dumb"}
    del variables["HF_HUB_DISABLE_PROGRESS_BARS"]
    child = pexpect.spawn(
        START[0], [*START[1:], "push", str(adapter), ADAPTER], env=variables, encoding="utf-8", timeout=120
    )
    child.expect("Licence of the adapter")
    child.sendline("cc-by-4.0")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0 and server.endpoint in child.before
    assert "deltamem.safetensors: 100%" in child.before
    assert "license: cc-by-4.0" in server.files_at(ADAPTER)["README.md"].decode()
    assert {request.headers["Authorization"] for request in server.requests if not request.storage} == {
        "Bearer hf_of_someone"
    }
    assert not (tmp_path / "home" / "token").exists()


@pytest.mark.server
def test_the_saved_token_is_used_and_cached_files_work_offline(server, adapter, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text("hf_of_someone")
    variables = environment(server, home)
    del variables["HF_HUB_DISABLE_PROGRESS_BARS"]
    pushed = in_a_process("push", adapter, ADAPTER, "--private", "--json", cwd=tmp_path, env=variables)
    # No terminal: no prompt and no progress bars.
    assert pushed.code == 0 and "Licence" not in pushed.err and "%" not in pushed.err, pushed.err
    report = json.loads(pushed.out)
    assert report["commit"] == server.head(ADAPTER) and "names no licence" in report["notes"][0]
    assert server.repo(ADAPTER).private

    pulled = in_a_process("pull", ADAPTER, cwd=tmp_path, env=variables)
    assert pulled.code == 0 and "an adapter and an ONNX folder" in pulled.err, pulled.err
    folder = Path(pulled.out.strip())
    assert folder.is_relative_to(home / "hub") and folder.name == server.head(ADAPTER)

    server.requests.clear()
    offline = variables | {"HF_HUB_OFFLINE": "1"}
    assert in_a_process("pull", ADAPTER, cwd=tmp_path, env=offline).out == pulled.out
    assert not server.requests
