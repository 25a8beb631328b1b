"""`push(space=True)` over HTTP, with the Hub's own client: the page is pushed to a static Space."""

from __future__ import annotations

import json

import pytest
from helpers.publishing import adapter_folder, onnx_folder

from deltamem_tool.errors import ConfigError, ExportError, HubError, InstallationError
from deltamem_tool.hub.push import push
from deltamem_tool.onnx.contract import MANIFEST_FILE
from deltamem_tool.page import build

REPO = "someone/memory"


@pytest.fixture
def writable_hub(hub, monkeypatch):
    """A Hub to which the user may write; the npm packages are a few bytes here."""
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setattr(
        build, "runtime_contents", lambda files, *others: {file.name: file.name.encode() for file in files}
    )
    return hub


@pytest.fixture
def adapter(tmp_path):
    return adapter_folder(tmp_path / "adapter")


@pytest.fixture
def onnx(tmp_path):
    return onnx_folder(tmp_path / "graph")


def test_the_page_is_pushed_to_a_space_that_the_card_links(writable_hub, adapter, onnx):
    pushed = push(adapter, REPO, onnx=onnx, license="mit", space=True)
    assert pushed.space == f"{writable_hub.endpoint}/spaces/{REPO}"
    assert f"[Talk to it in your browser]({pushed.space})" in writable_hub.files_at(REPO)["README.md"].decode()
    files = writable_hub.files_at(REPO, repo_type="space")
    assert {change.path for change in pushed.space_changes} | {".gitattributes"} == set(files)
    card = files["README.md"].decode()
    assert "sdk: static\n" in card and f"models:\n- {REPO}\n" in card and "license: mit\n" in card
    assert {"index.html", "site.js", "service.js", "library/index.js", "runtime/jinja.js"} < set(files)
    expected = json.loads(files["files.json"])["expected"]
    assert {f"model/{name}" for name in expected["model"]} < set(files)
    assert files["model/model.onnx.data"] == (onnx / "model.onnx.data").read_bytes()
    assert "spaces" not in str(writable_hub.files_at(REPO).keys()) and "site.js" not in writable_hub.files_at(REPO)


def test_only_changed_files_are_sent_and_the_users_text_is_kept(writable_hub, adapter, onnx):
    push(adapter, REPO, onnx=onnx, space=True)
    head = writable_hub.head(REPO, repo_type="space")
    again = push(adapter, REPO, onnx=onnx, space=True)
    assert {change.kind for change in again.space_changes} == {"same"}
    assert writable_hub.head(REPO, repo_type="space") == head
    (onnx / "chat_template.jinja").write_text("{{ messages }}")
    third = push(adapter, REPO, onnx=onnx, space=True)
    changed = {change.path: change.kind for change in third.space_changes if change.kind != "same"}
    assert changed == {"model/chat_template.jinja": "new", "files.json": "changed", "service.js": "changed"}
    (onnx / "chat_template.jinja").unlink()
    fourth = push(adapter, REPO, onnx=onnx, space=True)
    assert {change.path for change in fourth.space_changes if change.kind == "deleted"} == {"model/chat_template.jinja"}
    assert "model/chat_template.jinja" not in writable_hub.files_at(REPO, repo_type="space")
    without = push(adapter, REPO, onnx=onnx)
    assert without.space is None and "in your browser" in without.card  # the link is kept


def test_a_dry_run_sends_nothing(writable_hub, adapter, onnx):
    planned = push(adapter, REPO, onnx=onnx, space=True, dry_run=True)
    assert {change.kind for change in planned.space_changes} == {"new"} and planned.space in planned.card
    assert not writable_hub.asked("POST .*/(commit|create)")


def test_invalid_options_raise_before_anything_is_sent(writable_hub, adapter, onnx, monkeypatch):
    for options in ({"branch": "other"}, {"create_pr": True}):
        with pytest.raises(ConfigError, match="only to its main branch"):
            push(adapter, REPO, onnx=onnx, space=True, **options)
    with pytest.raises(ConfigError, match="Add --space"):
        push(adapter, REPO, onnx=onnx, runtime=onnx)
    with pytest.raises(HubError, match="has no ONNX folder"):
        push(adapter, REPO, space=True)
    writable_hub.add_repo(REPO, {"README.md": b"mine"}, repo_type="space")
    with pytest.raises(HubError, match="Space someone/memory already exists, and it is public"):
        push(adapter, REPO, onnx=onnx, space=True, private=True)

    def missing(*arguments):
        raise InstallationError("npm is not reached.")

    with monkeypatch.context() as patched:
        patched.setattr(build, "runtime_contents", missing)
        with pytest.raises(InstallationError):
            push(adapter, REPO, onnx=onnx, space=True)
    manifest = json.loads((onnx / MANIFEST_FILE).read_text("utf-8"))
    manifest["interface"]["max_length"] = 64
    (onnx / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ExportError, match="does not run in a page"):
        push(adapter, REPO, onnx=onnx, space=True)
    assert not writable_hub.asked("POST .*/(commit|create)")


def test_the_users_text_in_a_space_is_kept(writable_hub, adapter, onnx):
    writable_hub.add_repo(
        REPO, {"README.md": b"mine", "notes.txt": b"mine", "library/old.js": b"old"}, repo_type="space"
    )
    push(adapter, REPO, onnx=onnx, space=True)
    files = writable_hub.files_at(REPO, repo_type="space")
    assert files["README.md"] == files["notes.txt"] == b"mine" and "library/old.js" not in files
