"""The fake Hub produces the faults that a test asks for, and no test reaches another Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from fake_hub.client import LARGE, REPO, SMALL, WEIGHTS, commit, writer
from fake_hub.faults import answer, cut_answer, cut_request, delay, lose_answer
from fake_hub.isolation import environment
from fake_hub.server import HubServer
from huggingface_hub import constants, hf_hub_download, hf_hub_url, model_info
from huggingface_hub.errors import HfHubHTTPError

BIG = bytes(1_000_000)


@pytest.fixture
def api(hub):
    return writer(hub)


@pytest.mark.parametrize("status", [401, 403, 404, 409, 413])
def test_an_error_status_reaches_the_client(hub, api, status):
    hub.fail("POST .*/commit/main", answer(status, "not now", X_Request_Id="abc"))
    with pytest.raises(HfHubHTTPError, match="not now") as caught:
        commit(api, {"a.txt": b"1"})
    assert caught.value.response.status_code == status and caught.value.request_id == "abc"
    assert hub.files_at(REPO) == {}
    commit(api, {"a.txt": b"1"})  # only once
    assert hub.files_at(REPO) == {"a.txt": b"1"} and [r.status for r in hub.asked("/commit/")] == [status, 200]


def test_temporary_errors_are_retried(hub, api):
    hub.fail("POST .*/preupload/", answer(500), times=2)
    hub.fail(lambda request: request.storage and request.method == "PUT", answer(429, Retry_After="6"))
    commit(api, {"a.bin": b"1"})
    assert [request.status for request in hub.asked("/preupload/")] == [500, 500, 200]
    assert [request.status for request in hub.asked("PUT")] == [429, 200] and hub.waits == [1, 2, 7]


def test_permanent_errors_raise(hub, api):
    hub.fail("/preupload/", answer(503), times=None)
    with pytest.raises(HfHubHTTPError, match="503"):
        commit(api, {"a.bin": b"1"})
    assert len(hub.asked("/preupload/")) == 6
    hub.faults.clear()
    commit(api, {"a.bin": b"1"})


def test_a_connection_cut_while_sending_is_retried(hub, api):
    hub.fail("PUT", cut_request(), times=2)
    commit(api, {"a.bin": BIG})
    broken = hub.asked("PUT")[:2]
    assert [each.status for each in broken] == [None, None] and len({each.cut_at for each in broken}) == 2
    assert all(0 < each.cut_at == each.size < len(BIG) for each in broken)
    assert hub.files_at(REPO)["a.bin"] == BIG
    before = hub.head(REPO)
    hub.fail("/commit/", cut_request(after=30))
    with pytest.raises(httpx2.TransportError):
        commit(api, {"a.txt": b"1"})
    assert hub.asked("/commit/")[-1].size == 30 and hub.head(REPO) == before


@pytest.mark.parametrize("name", ["a.txt", "a.bin"])
def test_a_connection_cut_while_fetching_is_resumed(hub, api, name, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # nothing of a truncated chunk is kept
    content = b"abcdefgh" * 10_000
    hub.add_repo(REPO, {name: content})
    at = "GET /download/" if name == "a.bin" else "GET .*/resolve/"
    hub.fail(at, cut_answer(after=50_000))
    assert Path(hf_hub_download(REPO, name)).read_bytes() == content
    first, second = hub.asked(at)
    assert first.cut_at == 50_000 and hub.waits == [1]
    assert (second.headers["Range"], second.status) == ("bytes=50000-", 206)


def test_an_answer_cut_after_its_headers_raises(hub, api):
    hub.fail("/api/models/", cut_answer(after=0))
    with pytest.raises(httpx2.RemoteProtocolError, match="received 0 bytes"):
        api.model_info(REPO)


def test_a_lost_answer_has_been_carried_out(hub, api):
    hub.fail("/commit/", lose_answer())
    with pytest.raises(httpx2.RemoteProtocolError, match="without sending a response"):
        commit(api, {"a.txt": b"1"})
    assert hub.files_at(REPO) == {"a.txt": b"1"} and hub.asked("/commit/")[0].status is None


def test_a_slow_hub_times_out(hub, api):
    hub.add_repo(REPO, {"a.txt": b"1"})
    address = hf_hub_url(REPO, "a.txt")
    hub.fail("HEAD", delay(30))
    with pytest.raises(httpx2.ReadTimeout):
        api.get_hf_file_metadata(url=address, timeout=0.1)
    hub.fail("HEAD", delay(0.2))
    start = time.monotonic()
    assert api.get_hf_file_metadata(url=address, timeout=20).size == 1
    assert time.monotonic() - start >= 0.2


def test_the_seed_chooses_the_byte_of_a_cut():
    def cuts(seed):
        with HubServer(seed=seed) as server, httpx2.Client() as http:
            server.fail("", cut_request(), times=None)
            for _ in range(4):
                with pytest.raises(httpx2.TransportError):
                    http.post(server.endpoint, content=bytes(100_000))
            return [request.cut_at for request in server.requests]

    one = cuts(1)
    assert one == cuts(1) != cuts(2) and len(set(one)) == 4


def test_unsupported_requests_fail_the_test():
    with HubServer() as server:
        assert httpx2.get(f"{server.endpoint}/api/collections/a/b").status_code == 501
    with pytest.raises(json.JSONDecodeError), HubServer() as server:
        server.add_repo(REPO, {})
        headers = {"Authorization": "Bearer hf_write"}
        with pytest.raises(httpx2.RemoteProtocolError):
            httpx2.post(f"{server.endpoint}/api/repos/create", content=b"{", headers=headers)


# Isolation from other Hubs


def test_this_process_reaches_no_other_hub(hub):
    hub.add_repo(REPO, {"a.bin": WEIGHTS})
    home = constants.HF_HOME
    assert hf_hub_download(REPO, "a.bin").startswith(home) and model_info(REPO).sha == hub.head(REPO)
    real = (str(Path.home()), "https://huggingface.co")
    for name, value in vars(constants).items():
        if isinstance(value, str) and name.isupper() and not name.startswith(("_", "HUGGINGFACE_CO_URL_HOME")):
            assert not value.startswith(real), f"{name} is still {value}"
    with pytest.raises(httpx2.ConnectError, match="not to leave this machine"):
        httpx2.get("https://huggingface.co/api/models")
    assert hub.sought == ["huggingface.co"]
    hub.sought.clear()  # it would make this test fail


_FETCH = """
import pathlib, sys
from huggingface_hub import snapshot_download, whoami
print(whoami()["name"], *sorted(path.name for path in pathlib.Path(snapshot_download(sys.argv[1])).iterdir()))
"""


def test_a_child_process_reaches_no_other_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "person"))
    (tmp_path / "person").mkdir()
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with HubServer() as server:
        server.add_repo(REPO, SMALL | LARGE, private=True)
        command = [sys.executable, "-c", _FETCH, REPO]
        variables = environment(server, tmp_path / "home", token="hf_read")
        result = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["someone", *sorted({path.split("/")[0] for path in SMALL | LARGE})]
    assert not list((tmp_path / "person").rglob("*")) and (tmp_path / "home" / "hub").is_dir()
