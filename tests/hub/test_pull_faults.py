"""Faults during `pull`: the folder is complete or absent, and a second pull succeeds."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_hub.faults import Fault, answer, cut_answer, delay, garble_answer, lose_answer
from fake_hub.messages import Reply
from fake_hub.server import HubServer
from helpers.publishing import adapter_folder, onnx_folder, trained

from deltamem_tool.errors import HubError
from deltamem_tool.hub.pull import pull

pytestmark = pytest.mark.slow

REPO = "someone/memory"
STAGES = {"look": "GET /api/models/", "small": "(HEAD|GET) .*/resolve/.*config.json", "large": "GET /download/"}
FAULTS = {  # with words of the error message
    "401": (answer(401, "bad token"), ("token", "hf auth login")),
    "403": (answer(403, "not yours"), ("token", "read access")),
    "429": (answer(429, "slow down", Retry_After="17"), ("too many requests", "Try again in 17 s")),
    "500": (answer(500, "oops"), ("internal error (500)", "Try again")),
    "cut answer": (cut_answer(), ("connection failed", "Check the network")),
    "lost answer": (lose_answer(), ("connection failed", "Check the network")),
    "garbled answer": (garble_answer(), ("Hub", "network")),
}
AT_STORAGE = {name: ("storage rejected", "Try again") for name in ("401", "403")}


@pytest.fixture
def hub_with_repo(hub: HubServer, tmp_path) -> HubServer:
    folder = trained(adapter_folder(tmp_path / "adapter"))
    onnx_folder(folder / "onnx")
    hub.add_repo(REPO, folder)
    return hub


def read(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused(out: Path | None) -> HubError:
    """The error of a failed pull; check that nothing is left at its destination."""
    with pytest.raises(HubError) as caught:
        pull(REPO, out=out)
    error = caught.value
    assert error.what and error.why and error.next and "\n" not in error.what + error.why + error.next
    assert out is None or list(out.parent.iterdir()) == []
    return error


@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_pull_leaves_nothing_and_a_second_succeeds(hub_with_repo, tmp_path, monkeypatch, stage):
    for name, (fault, words) in FAULTS.items():
        (tmp_path / name).mkdir()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / f"cache of {name}"))
        hub_with_repo.fail(STAGES[stage], fault, times=None)
        error = refused(tmp_path / name / "out")
        words = AT_STORAGE.get(name, words) if stage == "large" else words
        assert all(word in str(error) for word in words), f"{name}: {error}"
        hub_with_repo.faults.clear()
        assert read(pull(REPO, out=tmp_path / name / "out").path) == hub_with_repo.files_at(REPO), name


def test_temporary_faults_are_retried(hub_with_repo):
    for match in ("GET .*/resolve/.*config.json", STAGES["large"]):
        hub_with_repo.fail(match, cut_answer())
        hub_with_repo.fail(match, lose_answer())
    assert read(pull(REPO).path) == hub_with_repo.files_at(REPO)


@pytest.mark.parametrize("path", ["deltamem.safetensors", "onnx/model.onnx.data", "training.json"])
def test_wrong_content_is_detected(hub_with_repo, tmp_path, path):
    """Content of the right size, which is all that the client checks."""
    right = hub_with_repo.files_at(REPO)[path]
    wrong = right[:-9] + bytes(byte ^ 1 for byte in right[-9:])
    hub_with_repo.fail(lambda r: r.method == "GET" and r.raw_path.endswith(path), Fault(reply=Reply(200, {}, wrong)))
    (tmp_path / "here").mkdir()
    error = refused(tmp_path / "here" / "out")
    assert (
        Path(path).name in error.what
        and "does not match the file on the Hub" in error.what
        and "Pull again" in error.next
    )
    assert read(pull(REPO, out=tmp_path / "here" / "out").path) == hub_with_repo.files_at(REPO)


def test_a_wrong_size_is_detected(hub_with_repo):
    hub_with_repo.fail(STAGES["large"], Fault(reply=Reply(200, {}, b"short")), times=None)
    assert "size" in refused(None).why
    hub_with_repo.faults.clear()
    assert read(pull(REPO).path) == hub_with_repo.files_at(REPO)


def test_a_partial_file_in_the_cache_is_not_used(hub_with_repo, monkeypatch):
    hub_with_repo.fail(lambda r: r.method in ("HEAD", "GET") and "/onnx/" in r.raw_path, answer(500), times=None)
    refused(None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        pull(REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub_with_repo.faults.clear()
    pulled = pull(REPO)
    assert pulled.contents.parts == ["adapter", "ONNX folder"] and read(pulled.path) == hub_with_repo.files_at(REPO)


def test_a_slow_hub_times_out_and_a_second_pull_succeeds(hub_with_repo, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub_with_repo.fail(STAGES["large"], delay(60), times=None)
    assert "did not answer in time" in refused(None).why
    hub_with_repo.faults.clear()
    assert read(pull(REPO).path) == hub_with_repo.files_at(REPO)


def test_an_old_folder_is_kept_until_the_new_one_is_complete(hub_with_repo, tmp_path):
    out = tmp_path / "here" / "out"
    out.mkdir(parents=True)
    (out / "mine").write_text("1")
    hub_with_repo.fail(STAGES["large"], cut_answer(), times=None)
    with pytest.raises(HubError):
        pull(REPO, out=out, overwrite=True)
    assert read(out) == {"mine": b"1"} and list(out.parent.iterdir()) == [out]
    hub_with_repo.faults.clear()
    pull(REPO, out=out, overwrite=True)
    assert read(out) == hub_with_repo.files_at(REPO)
