"""Faults during `push`: the repository holds the old files or the new, the message says what happened,
and a second push finishes."""

from __future__ import annotations

import _thread
import random
import re
import threading
from pathlib import Path

import pytest
from fake_hub.faults import SOMEWHERE, Fault, Faults, answer, cut_answer, cut_request, delay, garble_answer, lose_answer
from fake_hub.server import HubServer
from helpers.publishing import adapter_folder, onnx_folder, other_adapter, trained
from httpx2 import Client
from huggingface_hub.utils import _http

from deltamem_tool.errors import HubError
from deltamem_tool.hub.push import PushResult, push

pytestmark = pytest.mark.slow

REPO = "someone/memory"
OLD = {"README.md": b"---\nlicense: mit\n---\n# Mine\n", "deltamem.safetensors": b"old" * 9, "notes.md": b"mine"}
LOOK = "GET /api/models/[^/]+/[^/]+/revision/"
STAGES = {  # the requests of a push, in order
    "look": LOOK,
    "tree": "GET .*/tree/",
    "card": "(HEAD|GET) .*/resolve/.*README",
    "create": "POST /api/repos/create",
    "branch": "POST .*/branch/",
    "validate": "POST /api/validate-yaml",
    "preupload": "POST .*/preupload/",
    "batch": "POST .*/objects/batch",
    "put": "^PUT",
    "complete": "POST .*/complete_multipart/",
    "verify": "POST .*/objects/verify",
    "commit": "POST .*/commit/",
}
READING = ("look", "tree", "card")
FAULTS = {  # with words of the error message
    "401": (answer(401, "bad token"), ("token", "hf auth login")),
    "403": (answer(403, "not yours"), ("token", "access")),
    "404": (answer(404, "gone"), ("cannot find it", "Check the name")),
    "409": (answer(409, "busy"), ("changed in the meantime", "push again")),
    "412": (answer(412, "moved"), ("changed in the meantime", "push again")),
    "413": (answer(413, "big"), ("too large", "smaller")),
    "429": (answer(429, "slow down", Retry_After="17"), ("too many requests", "Try again in 17 s")),
    "500": (answer(500, "oops"), ("internal error (500)", "Try again")),
    "cut request": (cut_request(), ("connection failed", "Check the network")),
    "cut answer": (cut_answer(), ("connection failed", "Check the network")),
    "lost answer": (lose_answer(), ("connection failed", "Check the network")),
    "garbled answer": (garble_answer(), ("HF_ENDPOINT",)),
}
AT_STORAGE = {name: ("storage rejected", "Try again") for name in ("401", "403")}
LANDS = {  # the Hub has handled the request, or its answer is not needed
    *(("commit", fault) for fault in ("cut answer", "lost answer", "garbled answer")),
    ("put", "cut answer"),
    *((stage, "garbled answer") for stage in ("branch", "complete", "verify")),
}


@pytest.fixture
def hub_with_repo(hub: HubServer, monkeypatch) -> HubServer:
    """A Hub on which `REPO` holds `OLD`, and to which the larger files are sent in parts."""
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    hub.multipart_size = hub.part_size = 200_000
    hub.add_repo(REPO, OLD)
    return hub


@pytest.fixture
def adapter(tmp_path) -> Path:
    return trained(adapter_folder(tmp_path / "adapter"))


def start_anew(hub: HubServer, files: dict[str, bytes] | None) -> None:
    """Reset `REPO` to these files without history, or remove it for None."""
    hub.faults.clear()
    hub.repositories.clear()
    if files is not None:
        hub.add_repo(REPO, files)
    hub.requests.clear()


def files(hub: HubServer, branch: str = "main") -> dict[str, bytes]:
    """The files of the branch, or of `main` if the branch does not exist."""
    if not hub.repositories:
        return {}
    ref = branch if hub.repo(REPO).ref(branch) else "main"
    return {path: content for path, content in hub.files_at(REPO, ref).items() if path != ".gitattributes"}


def finished(hub: HubServer, folder: Path, old: dict[str, bytes] | None = OLD, **options) -> dict[str, bytes]:
    """The files after a push without faults. The Hub is reset afterwards."""
    push(folder, REPO, **options)
    new = files(hub, options.get("branch", "main"))
    start_anew(hub, old)
    return new


def refused(folder: Path, **options) -> HubError:
    """The error of a failed push; check that it has three complete sentences."""
    with pytest.raises(HubError) as caught:
        push(folder, REPO, **options)
    error = caught.value
    for line in (error.what, error.why, error.next):
        assert re.fullmatch(r"[^\n]*[^.\n]\.", line), line
    assert REPO in error.what
    return error


def when(hub: HubServer, monkeypatch, match, act) -> None:
    """Call `act` once, just before the answer to a matching request."""
    answer, left = hub.answer, [act]

    def answer_after(request):
        if left and request.matches(match):
            left.pop()()
        return answer(request)

    monkeypatch.setattr(hub, "answer", answer_after)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_push_keeps_the_repository_and_a_second_succeeds(hub_with_repo, adapter, stage):
    old = None if stage == "create" else OLD
    options = {"branch": "v2"} if stage == "branch" else {}
    start_anew(hub_with_repo, old)
    new = finished(hub_with_repo, adapter, old, **options)
    assert new.keys() >= {"deltamem_config.json", "training.png", "README.md"} and new != old
    for name, (fault, words) in FAULTS.items():
        hub_with_repo.fail(STAGES[stage], fault, times=None)
        if (stage, name) in LANDS:
            assert push(adapter, REPO, **options).commit == hub_with_repo.head(REPO, options.get("branch", "main")), (
                name
            )
            assert files(hub_with_repo, **options) == new
        else:
            error = refused(adapter, **options)
            words = AT_STORAGE.get(name, words) if stage == "put" else words
            assert all(word in str(error) for word in words), f"{name}: {error}"
            assert files(hub_with_repo, **options) == (old or {}), name
        hub_with_repo.faults.clear()
        push(adapter, REPO, **options)
        assert files(hub_with_repo, **options) == new, name
        assert not options or files(hub_with_repo) == OLD
        start_anew(hub_with_repo, old)


def test_pushes_without_permission_raise(hub_with_repo, adapter):
    for stage in ("look", "commit"):
        hub_with_repo.fail(STAGES[stage], answer(403))
        assert ("write access" in refused(adapter).next) == (stage == "commit")
    start_anew(hub_with_repo, OLD)
    hub_with_repo.fail("^PUT", answer(403, "Request has expired"), times=None)
    error = refused(adapter)
    assert "storage rejected" in error.why and "has expired" in error.why and "clock" in error.next


def test_temporary_faults_are_retried(hub_with_repo, adapter):
    new = finished(hub_with_repo, adapter)
    for stage in ("tree", "preupload", "batch", "put", "complete", "verify"):
        hub_with_repo.fail(STAGES[stage], answer(429, Retry_After="3"))
        hub_with_repo.fail(STAGES[stage], lose_answer())
    push(adapter, REPO)
    assert files(hub_with_repo) == new and hub_with_repo.waits.count(4) == 6  # the client adds a second


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(start, start + 10) for start in (0, 10, 20, 30)], ids=lambda seeds: seeds[0])
def test_a_connection_cut_at_any_byte_leaves_old_or_new_files(hub_with_repo, adapter, seeds):
    new = finished(hub_with_repo, adapter)
    for seed in seeds:
        chance = random.Random(seed)
        at, how = chance.randrange(17), chance.choice([Fault(cut_request=SOMEWHERE), Fault(cut_answer=SOMEWHERE)])
        hub_with_repo.faults = Faults(seed)
        hub_with_repo.fail(lambda _, at=at: len(hub_with_repo.requests) > at, how, chance.choice([1, None]))
        try:
            push(adapter, REPO)
            assert files(hub_with_repo) == new, seed
        except HubError:
            assert files(hub_with_repo) in (OLD, new), seed
        hub_with_repo.faults.clear()
        push(adapter, REPO)
        assert files(hub_with_repo) == new, seed
        start_anew(hub_with_repo, OLD)


def test_a_commit_whose_answer_is_lost_is_found(hub_with_repo, adapter):
    new = finished(hub_with_repo, adapter)
    hub_with_repo.fail("/commit/", lose_answer())
    pushed = push(adapter, REPO)
    assert pushed.commit == hub_with_repo.head(REPO) and files(hub_with_repo) == new
    assert len(hub_with_repo.asked("/commit/")) == 1


def test_a_lost_answer_and_an_unreachable_hub_are_reported(hub_with_repo, adapter):
    new = finished(hub_with_repo, adapter)
    hub_with_repo.fail("/commit/", lose_answer())
    hub_with_repo.fail(
        lambda request: request.matches(LOOK) and bool(hub_with_repo.asked("/commit/")), answer(503), times=None
    )
    error = refused(adapter)
    assert "answer was lost" in error.what and "all of this push or none" in error.what and "Push again" in error.next
    hub_with_repo.faults.clear()
    hub_with_repo.requests.clear()
    assert push(adapter, REPO).commit == hub_with_repo.head(REPO) and files(hub_with_repo) == new
    assert not hub_with_repo.asked("^(POST|PUT)")


def test_a_lost_commit_is_reported(hub_with_repo, adapter):
    hub_with_repo.fail("/commit/", cut_request(after=99))
    error = refused(adapter)
    assert "answer was lost" in error.what and "nothing of this push" in error.what and files(hub_with_repo) == OLD


def test_a_lost_answer_is_told_apart_from_another_commit(hub_with_repo, adapter, monkeypatch):
    new = finished(hub_with_repo, adapter)
    theirs = {**new, "deltamem.safetensors": b"theirs"}
    hub_with_repo.fail("/commit/", lose_answer())
    looks = (request for request in [False, True])  # the second look is after the commit
    when(
        hub_with_repo,
        monkeypatch,
        lambda r: r.matches(LOOK) and next(looks),
        lambda: hub_with_repo.add_repo(REPO, theirs),
    )
    error = refused(adapter)
    assert "somebody else" in error.what and "push again" in error.next and files(hub_with_repo) == theirs


def test_a_lost_pull_request_is_reported(hub_with_repo, adapter):
    hub_with_repo.fail("^PUT", answer(500), times=None)
    assert "pull request" not in str(refused(adapter, create_pr=True))  # no fault was added for it
    hub_with_repo.faults.clear()
    new = finished(hub_with_repo, adapter)
    hub_with_repo.fail("/commit/", lose_answer())
    error = refused(adapter, create_pr=True)
    assert "may or may not have been opened" in error.what and "/discussions" in error.next
    assert files(hub_with_repo) == OLD and hub_with_repo.files_at(REPO, "refs/pr/1") == new


@pytest.mark.parametrize("old", [OLD, None], ids=["there", "new"])
def test_one_of_two_concurrent_pushes_raises(hub_with_repo, adapter, tmp_path, monkeypatch, old):
    start_anew(hub_with_repo, old)
    folders = (adapter, other_adapter(tmp_path / "other"))
    new = [finished(hub_with_repo, folder, old) for folder in folders]
    barrier = threading.Barrier(2, timeout=30)
    answer, stage = hub_with_repo.answer, STAGES["commit" if old else "create"]

    def answer_both(request):
        if request.matches(stage):
            barrier.wait()
        return answer(request)

    monkeypatch.setattr(hub_with_repo, "answer", answer_both)
    ended: dict[int, PushResult | HubError] = {}

    def run(which: int) -> None:
        try:
            ended[which] = push(folders[which], REPO)
        except HubError as error:
            ended[which] = error

    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [which for which, end in ended.items() if isinstance(end, PushResult)]
    message = ended[1 - winner]
    assert files(hub_with_repo) == new[winner] and isinstance(message, HubError)
    assert "changed in the meantime" in message.why and "push again" in message.next


@pytest.mark.parametrize("stage", ["card", "validate", "put", "commit"])
def test_a_concurrent_commit_is_not_overwritten(hub_with_repo, adapter, monkeypatch, stage):
    theirs = OLD | {"README.md": b"---\nlicense: mit\n---\n# Mine\nTheir words\n", "theirs.md": b"1"}
    when(hub_with_repo, monkeypatch, STAGES[stage], lambda: hub_with_repo.add_repo(REPO, theirs))
    error = refused(adapter)
    assert "changed in the meantime" in error.why and files(hub_with_repo) == theirs
    push(adapter, REPO)
    now = files(hub_with_repo)
    assert now["theirs.md"] == b"1" and b"Their words" in now["README.md"] and b"deltamem.load" in now["README.md"]


def test_a_repository_created_meanwhile_is_not_overwritten(hub_with_repo, adapter, monkeypatch):
    start_anew(hub_with_repo, None)
    theirs = {"README.md": b"# Theirs\n"}
    when(hub_with_repo, monkeypatch, STAGES["create"], lambda: hub_with_repo.add_repo(REPO, theirs))
    assert "changed in the meantime" in refused(adapter, private=True).why  # the other one is public
    assert files(hub_with_repo) == theirs
    start_anew(hub_with_repo, None)
    looks = iter([False, True])
    when(
        hub_with_repo,
        monkeypatch,
        lambda r: r.matches(LOOK) and next(looks),
        lambda: hub_with_repo.add_repo(REPO, theirs),
    )
    assert "created by somebody else" in refused(adapter).what and files(hub_with_repo) == theirs


def test_a_part_that_cannot_be_fetched_raises(hub_with_repo, adapter, tmp_path):
    push(onnx_folder(tmp_path / "graph"), REPO)
    old = files(hub_with_repo)
    hub_with_repo.fail("GET .*onnx/deltamem_onnx.json", answer(500), times=None)
    refused(adapter)  # and not a card without it
    assert files(hub_with_repo) == old
    hub_with_repo.faults.clear()
    assert "OnnxModel" in push(adapter, REPO).card


def test_a_slow_hub_times_out_and_a_second_push_succeeds(hub_with_repo, adapter, monkeypatch):
    new = finished(hub_with_repo, adapter)
    hub_with_repo.fail(LOOK, delay(60))
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.3)
        error = refused(adapter)
    assert "did not answer in time" in error.why and "Check the network" in error.next
    push(adapter, REPO)
    assert files(hub_with_repo) == new


class InAHurry(Client):
    """A client that waits only briefly for the answer to a commit."""

    def send(self, request, **options):
        if "/commit/" in request.url.path:
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), 0.5)
        return super().send(request, **options)


def test_a_commit_that_is_applied_late_is_reported(hub_with_repo, adapter, monkeypatch):
    """The client has already disconnected, and has checked the repository."""
    new = finished(hub_with_repo, adapter)
    client_gone, landed, reply = threading.Event(), threading.Event(), hub_with_repo.answer

    def reply_late(request):
        if not request.matches(STAGES["commit"]):
            return reply(request)
        client_gone.wait()
        late = reply(request)
        landed.set()
        return late

    monkeypatch.setattr(hub_with_repo, "answer", reply_late)
    with monkeypatch.context() as patch:
        patch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", InAHurry)
        _http.close_session()
        try:
            error = refused(adapter)
            assert files(hub_with_repo) == OLD
        finally:
            client_gone.set()
    _http.close_session()
    assert "answer was lost" in error.what and "so far" in error.what and "in time" in error.why
    landed.wait()
    hub_with_repo.requests.clear()
    assert push(adapter, REPO).commit == hub_with_repo.head(REPO) and files(hub_with_repo) == new
    assert not hub_with_repo.asked("^(POST|PUT)")


def test_an_unreachable_hub_raises(hub_with_repo, adapter, monkeypatch):
    with HubServer() as gone:
        nowhere = gone.endpoint
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    error = refused(adapter)
    assert "connection failed" in error.why and files(hub_with_repo) == OLD


def test_an_interrupted_upload_leaves_the_old_files(hub_with_repo, adapter, monkeypatch):
    new = finished(hub_with_repo, adapter)
    when(hub_with_repo, monkeypatch, "^PUT", _thread.interrupt_main)
    with pytest.raises(KeyboardInterrupt):
        push(adapter, REPO)
    assert hub_with_repo.asked("^PUT") and not hub_with_repo.asked("/commit/") and files(hub_with_repo) == OLD
    push(adapter, REPO)
    assert files(hub_with_repo) == new


def test_an_unreadable_file_raises(hub_with_repo, adapter, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "deltamem.safetensors")

    monkeypatch.setattr("huggingface_hub._commit_api.lfs_upload", refuse)
    with pytest.raises(PermissionError, match=r"deltamem.safetensors"):  # the system's words, not the Hub's
        push(adapter, REPO)
    assert files(hub_with_repo) == OLD


def test_a_card_that_is_not_text_raises(hub_with_repo, adapter):
    start_anew(hub_with_repo, {"README.md": b"# caf\xe9\n"})
    with pytest.raises(HubError, match="UTF-8"):
        push(adapter, REPO)
    assert files(hub_with_repo) == {"README.md": b"# caf\xe9\n"}
