"""`push` and `pull` over HTTP, with the Hub's own client: what is committed, sent and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_hub.server import HubServer
from helpers.publishing import BASE, COMMIT, adapter_folder, evaluated, onnx_folder, other_adapter, trained

from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.errors import HubError
from deltamem_tool.hub.pull import pull
from deltamem_tool.hub.push import push
from deltamem_tool.onnx.locate import find_onnx, is_onnx
from deltamem_tool.onnx.manifest import Manifest

REPO = "someone/memory"


@pytest.fixture
def writable_hub(hub: HubServer, monkeypatch) -> HubServer:
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    return hub


@pytest.fixture
def adapter(tmp_path) -> Path:
    return evaluated(trained(adapter_folder(tmp_path / "adapter")))


@pytest.fixture
def onnx(tmp_path) -> Path:
    return onnx_folder(tmp_path / "graph")


def kinds(pushed) -> dict[str, str]:
    return {change.path: change.kind for change in pushed.changes}


def sent(hub: HubServer) -> set[str]:
    """The files that commits carried."""
    lines = [json.loads(line) for each in hub.asked("POST .*/commit/") for line in each.body.splitlines()]
    return {line["value"]["path"] for line in lines if line["key"] != "header"}


def test_both_parts_are_pushed_in_one_commit(writable_hub, adapter, onnx):
    pushed = push(adapter, REPO, onnx=onnx, license="mit", message="First")
    assert pushed.url == f"{writable_hub.endpoint}/{REPO}" and pushed.commit == writable_hub.head(REPO)
    assert len(writable_hub.asked("POST .*/commit/")) == 1 and not pushed.notes
    files = writable_hub.files_at(REPO)
    assert files.pop(".gitattributes")
    assert set(files) == {change.path for change in pushed.changes} and set(kinds(pushed).values()) == {"new"}
    card = files.pop("README.md").decode()
    assert card == pushed.card and "license: mit" in card and f"base_model: {BASE}" in card
    for path, content in files.items():
        folder = onnx if path.startswith("onnx/") else adapter
        assert content == (folder / path.removeprefix("onnx/")).read_bytes()
    assert set(files) >= {"deltamem.safetensors", "training.png", "evaluation.json", "onnx/model.onnx.data"}
    assert writable_hub.repo(REPO).resolve("main").message == "First"


def test_only_changed_files_are_sent(writable_hub, adapter, onnx):
    first = push(adapter, REPO, onnx=onnx, license="mit")
    writable_hub.requests.clear()
    again = push(adapter, REPO, onnx=onnx)
    assert again.commit == first.commit and set(kinds(again).values()) == {"same"}
    assert not writable_hub.asked("POST .*/(commit|preupload)/") and not writable_hub.asked("^PUT ")
    (onnx / "config.json").write_text("{}")
    (adapter / "training.png").unlink()
    third = push(adapter, REPO, onnx=onnx)
    assert {path: kind for path, kind in kinds(third).items() if kind != "same"} == {
        "onnx/config.json": "new",
        "training.png": "deleted",
    }
    assert sent(writable_hub) == {"onnx/config.json", "training.png"} and not writable_hub.asked("^PUT ")
    assert "training.png" not in writable_hub.files_at(REPO) and "onnx/config.json" in writable_hub.files_at(REPO)


def test_other_files_of_the_repository_are_kept(writable_hub, adapter, onnx):
    others = {
        "notes.md": b"mine",
        "onnx/model_q4.onnx": b"other",
        "samples/a.json": b"{}",
        "onnx/cuda/config.json": b"{}",
    }
    writable_hub.add_repo(REPO, {**others, "onnx/genai_config.json": b"{}"})
    push(adapter, REPO)
    assert writable_hub.files_at(REPO).items() >= {**others, "onnx/genai_config.json": b"{}"}.items()
    push(onnx, REPO)
    files = writable_hub.files_at(REPO)
    assert files.items() >= others.items() and "deltamem.safetensors" in files
    assert "onnx/genai_config.json" not in files  # from an earlier export


def test_parts_pushed_separately_share_one_card(writable_hub, adapter, onnx):
    push(adapter, REPO, license="mit")
    pushed = push(onnx, REPO)
    assert not pushed.notes and "ONNX Runtime" in pushed.card and "deltamem.load" in pushed.card
    assert "| questions | 200 | 150 |" in pushed.card and "| learning rate | 0.001 |" in pushed.card
    assert "license: mit" in pushed.card
    assert push(adapter, REPO).card == pushed.card


def test_parts_of_two_adapters_raise(writable_hub, adapter, onnx, tmp_path):
    """A client that downloads them together would reject them."""
    first = push(adapter, REPO, onnx=onnx, license="mit").commit
    writable_hub.requests.clear()
    with pytest.raises(HubError, match=r"of another adapter. Nothing was sent"):
        push(other_adapter(tmp_path / "other"), REPO)
    assert writable_hub.head(REPO) == first and not writable_hub.asked("GET .*model.onnx")
    with pytest.raises(HubError, match="was not exported from the adapter"):
        push(tmp_path / "other", REPO, onnx=onnx)


def test_an_evaluation_is_pushed_with_its_adapter(writable_hub, adapter, onnx):
    """After a push without an evaluation, the card no longer shows it."""
    push(adapter, REPO, onnx=onnx, license="mit")
    (adapter / "evaluation.json").unlink()
    pushed = push(adapter, REPO)
    assert kinds(pushed)["evaluation.json"] == "deleted" and "No evaluation was pushed" in pushed.card


def test_only_files_of_an_export_are_sent(writable_hub, onnx):
    (onnx / "transcript.json").write_text("{}")
    assert "onnx/transcript.json" not in kinds(push(onnx, REPO))


def test_pushing_to_a_branch_and_a_pull_request(writable_hub, adapter):
    main = writable_hub.add_repo(REPO, {"README.md": b"# Mine\n"})
    pushed = push(adapter, REPO, branch="v2", license="mit")
    assert pushed.url.endswith(f"{REPO}/tree/v2") and writable_hub.head(REPO) == main
    assert (
        writable_hub.head(REPO, "v2") == pushed.commit and b"# Mine" in writable_hub.files_at(REPO, "v2")["README.md"]
    )
    proposed = push(adapter, REPO, create_pr=True)
    assert "/discussions/1" in proposed.url and writable_hub.head(REPO) == main
    assert "deltamem.safetensors" in writable_hub.files_at(REPO, "refs/pr/1")
    assert push(adapter, "someone/new", branch="v1").commit == writable_hub.head("someone/new", "v1")


def test_a_dry_run_sends_nothing(writable_hub, adapter):
    pushed = push(adapter, REPO, dry_run=True)
    assert pushed.commit is None and "deltamem.load" in pushed.card and set(kinds(pushed).values()) == {"new"}
    assert not writable_hub.asked("^(POST|PUT) ") and not writable_hub.repositories


def test_a_private_push_to_a_public_repository_raises(writable_hub, adapter):
    push(adapter, REPO, private=True)
    assert writable_hub.repo(REPO).private
    assert push(adapter, REPO, private=True).commit == writable_hub.head(REPO)
    writable_hub.add_repo("someone/open", {"README.md": b"# Mine\n"})
    with pytest.raises(HubError, match="public"):
        push(adapter, "someone/open", private=True)
    assert set(writable_hub.files_at("someone/open")) == {"README.md"}


def test_a_local_path_is_never_recorded_as_the_base(writable_hub, tmp_path, monkeypatch):
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    folder = adapter_folder(tmp_path / "adapter", str(tmp_path / "bases" / "mine"), None)
    with pytest.raises(HubError, match="--base-model"):
        push(folder, REPO)
    monkeypatch.chdir(tmp_path)
    relative = adapter_folder(tmp_path / "relative", "bases/mine", None)
    with pytest.raises(HubError, match="--base-model"):
        push(relative, REPO)
    assert not writable_hub.repositories
    graph = onnx_folder(tmp_path / "graph", base_model=str(tmp_path / "bases" / "mine"))
    push(folder, REPO, onnx=graph, base_model=f"{BASE}@{COMMIT}")
    at_hub = read_adapter(pull(REPO).path)
    assert (at_hub.base.name, at_hub.base.revision) == (BASE, COMMIT)
    assert Manifest.read(find_onnx(REPO)).base_model == BASE
    assert str(tmp_path) in (folder / "deltamem_config.json").read_text()  # the local files are unchanged
    push(graph, "someone/graph")
    assert Manifest.read(find_onnx("someone/graph")).base_model is None
    for repo_id in (REPO, "someone/graph"):
        for path, content in writable_hub.files_at(repo_id).items():
            assert str(tmp_path).encode() not in content and b"bases/mine" not in content, path


def test_a_base_in_the_hubs_cache_is_named_as_on_the_hub(writable_hub, tmp_path):
    cached = tmp_path / "hub" / "models--someone--base" / "snapshots" / COMMIT
    push(adapter_folder(tmp_path / "adapter", str(cached), None), REPO)
    base = read_adapter(pull(REPO).path).base
    assert (base.name, base.revision) == (BASE, COMMIT)


@pytest.mark.parametrize("file", ["tiny.gguf", "Q4/tiny.gguf"])
def test_a_gguf_file_on_the_hub_is_the_base(file, writable_hub, tmp_path):
    """The base is named by its Hub id or by its path in the cache. The card's metadata name only the repository."""
    cached = tmp_path / "hub" / "models--someone--base" / "snapshots" / COMMIT / file
    for name, revision in ((f"{BASE}:{file}", COMMIT), (str(cached), None)):
        pushed = push(adapter_folder(tmp_path / f"adapter {revision}", name, revision), REPO)
        base = read_adapter(pull(REPO).path).base
        assert (base.name, base.revision) == (f"{BASE}:{file}", COMMIT)
        assert f"base_model: {BASE}\n" in pushed.card
        assert f"[{BASE}:{file}](https://huggingface.co/{BASE})" in pushed.card


def test_a_local_gguf_file_is_not_recorded_as_the_base(writable_hub, tmp_path):
    for name in ("models/tiny.gguf", str(tmp_path / "tiny.gguf")):
        with pytest.raises(HubError, match="--base-model"):
            push(adapter_folder(tmp_path / name.replace("/", " "), name, None), REPO)
    push(adapter_folder(tmp_path / "adapter", name, None), REPO, base_model=f"{BASE}@{COMMIT}:tiny.gguf")
    base = read_adapter(pull(REPO).path).base
    assert (base.name, base.revision) == (f"{BASE}:tiny.gguf", COMMIT)


def test_an_evaluation_of_another_adapter_raises(writable_hub, tmp_path):
    folder = evaluated(adapter_folder(tmp_path / "adapter"), "0" * 64)
    with pytest.raises(HubError, match="another adapter"):
        push(folder, REPO)
    assert not writable_hub.repositories


@pytest.mark.parametrize("name", ["adapter", "smollm2-adapter"])
def test_a_shipped_adapter_can_be_pushed_by_name(name, writable_hub, deltamem):
    result = deltamem("push", f"builtin:{name}", REPO, "--license", "apache-2.0")
    assert result.code == 0, result.err
    shipped = read_adapter(f"builtin:{name}")
    assert read_adapter(REPO).fingerprint == shipped.fingerprint and read_adapter(REPO).base == shipped.base


def test_a_shipped_name_without_an_adapter_raises(writable_hub, deltamem):
    deltamem("push", "builtin:other", REPO).assert_short_error("does not ship builtin:other", "builtin:adapter", code=1)
    deltamem("push", "builtin:backbone", REPO).assert_short_error("contains no adapter", code=1)
    assert not writable_hub.repositories


def test_a_folder_without_anything_to_push_raises(writable_hub, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(HubError, match="no adapter and no ONNX folder"):
        push(tmp_path / "empty", REPO)
    with pytest.raises(HubError, match=r"Folder .* not found"):
        push(tmp_path / "nowhere", REPO)
    for name in ("memory", "someone/memory@v1", "hf://someone/memory/onnx", "a b/c"):
        with pytest.raises(HubError, match=r"not a (valid Hub id|repository name)"):
            push(adapter_folder(tmp_path / name.replace("/", "-")), name)


def test_a_pull_holds_exactly_the_adapter(writable_hub, adapter, onnx, tmp_path):
    push(adapter, REPO, onnx=onnx, license="mit")
    files = {**writable_hub.files_at(REPO), "setup.py": b"print()", "weights.pt": b"pickle", "onnx/op.so": b"ELF"}
    commit = writable_hub.add_repo(REPO, files)
    writable_hub.requests.clear()
    pulled = pull(REPO, out=tmp_path / "out")
    assert pulled.commit == commit and pulled.path == tmp_path / "out"
    here = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert here == files.keys() - {".gitattributes", "setup.py", "weights.pt", "onnx/op.so"}
    assert all(files[path] == (tmp_path / "out" / path).read_bytes() for path in here)
    assert not [path for path in writable_hub.fetched() if path.endswith((".py", ".pt", ".so"))]
    assert push(tmp_path / "out", REPO).commit == commit  # the pulled files are those of the repository
    writable_hub.add_repo("someone/else", {"model.bin": b"1"})
    with pytest.raises(HubError, match="no adapter"):
        pull("someone/else")


def test_names_with_revisions_are_pulled(writable_hub, adapter, onnx):
    first = push(adapter, REPO, license="mit").commit
    second = push(onnx, REPO).commit
    assert read_adapter(f"{REPO}@{first}").path.name == first
    assert read_adapter(f"hf://{REPO}").path.name == second
    assert is_onnx(f"hf://{REPO}/onnx") and not is_onnx(REPO) and not is_onnx(f"{REPO}@{first}")
    assert find_onnx(REPO) == find_onnx(f"{REPO}@main/onnx")
    assert pull(f"{REPO}@{first}").contents.onnx is None and pull(REPO, revision=second[:40]).contents.onnx is not None
    with pytest.raises(HubError, match="another revision"):
        read_adapter(f"{REPO}@{first}", revision=second)
    with pytest.raises(HubError, match="must not be an empty"):
        pull(REPO, revision="")
    with pytest.raises(HubError, match="no such branch"):
        read_adapter(f"{REPO}@v9")


def test_fetched_files_are_available_offline(writable_hub, adapter, monkeypatch):
    push(adapter, REPO, license="mit")
    pull(REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read_adapter(REPO).base.name == BASE
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        read_adapter("someone/unseen")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push(adapter, REPO)
