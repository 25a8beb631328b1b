"""The fake Hub against the real client: what it stores, returns and rejects."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from fake_hub.client import CARD, LARGE, REPO, SMALL, WEIGHTS, commit, read, writer
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, hf_hub_url
from huggingface_hub import snapshot_download as snapshot
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from huggingface_hub.utils.sha import git_hash

BIG = bytes(1_300_000)  # larger than files that are sent whole


@pytest.fixture
def api(hub):
    return writer(hub)


def sent(hub):
    """The content of the last commit: the kind of each line and its path."""
    lines = [json.loads(line) for line in hub.asked("POST .*/commit/")[-1].body.splitlines()]
    return [(line["key"], line["value"]["path"]) for line in lines[1:]]


# Stored content


def test_committed_files_are_read_back(hub, api, tmp_path):
    (tmp_path / "big.data").write_bytes(BIG)
    assert api.create_repo("someone/new", exist_ok=True).repo_id == "someone/new"
    assert api.create_repo("someone/new", exist_ok=True).repo_id == "someone/new"
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("someone/new")
    files = SMALL | LARGE
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    operations.append(CommitOperationAdd("onnx/model.onnx.data", tmp_path / "big.data"))
    result = api.create_commit("someone/new", operations, commit_message="All of it")
    assert result.oid == hub.head("someone/new") == api.model_info("someone/new").sha
    own = hub.files_at("someone/new")
    assert own.pop(".gitattributes") and own == files | {"onnx/model.onnx.data": BIG}
    in_parts = [request.size for request in hub.asked("PUT") if request.size > 100_000]
    assert in_parts == [1 << 19, 1 << 19, len(BIG) - (1 << 20)] and len(hub.asked("POST .*/complete_multipart/")) == 1
    assert len(hub.asked("POST .*/verify")) == len(LARGE) + 1
    assert sorted(path for kind, path in sent(hub) if kind == "lfsFile") == sorted([*LARGE, "onnx/model.onnx.data"])
    fetched = read(snapshot("someone/new"))
    assert fetched.pop(".gitattributes") and fetched == own
    assert Path(hf_hub_download("someone/new", "onnx/model.onnx.data")).read_bytes() == BIG
    not_empty = [path for path, content in own.items() if content]  # the client downloads no others
    assert sorted(hub.fetched()) == sorted(f"someone/new/{path}" for path in [*not_empty, ".gitattributes"])
    assert all(request.status == 302 for request in hub.asked(r"/resolve/.*\.safetensors"))


def test_metadata_of_files_is_returned(hub, api):
    commit(api, SMALL | LARGE)
    commit(api, {"config.json": b"{}"}, message="Smaller")
    entries = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert set(entries) == {*SMALL, *LARGE, "notes", "onnx"}
    assert entries["README.md"].blob_id == git_hash(CARD) and entries["README.md"].lfs is None
    weights = entries["adapter.safetensors"]
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest() and weights.size == len(WEIGHTS)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{weights.lfs.sha256}\nsize {len(WEIGHTS)}\n"
    assert weights.blob_id == git_hash(pointer.encode()) and weights.lfs.pointer_size == len(pointer)
    assert {entry.path for entry in api.list_repo_tree(REPO)} == {p.split("/")[0] for p in SMALL | LARGE}
    assert [entry.path for entry in api.list_repo_tree(REPO, "onnx")] == ["onnx/model.onnx"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "nowhere"))
    infos = api.get_paths_info(REPO, ["onnx", "config.json", "nowhere"])
    assert {entry.path for entry in infos} == {"onnx", "config.json"}
    info = api.model_info(REPO, files_metadata=True)
    assert {each.rfilename: each.size for each in info.siblings} == {p: len(c) for p, c in (SMALL | LARGE).items()} | {
        "config.json": 2
    }
    assert info.card_data.license == "apache-2.0"
    assert [each.title for each in api.list_repo_commits(REPO)] == ["Smaller", "Change", "Seed"]
    meta = api.get_hf_file_metadata(url=hf_hub_url(REPO, "adapter.safetensors"))
    assert (meta.etag, meta.size, meta.commit_hash) == (weights.lfs.sha256, len(WEIGHTS), hub.head(REPO))
    assert meta.location.startswith(hub.storage)


def test_a_tree_is_listed_in_pages(hub, api):
    hub.page_size = 3
    hub.add_repo(REPO, {f"{number}.txt": b"" for number in range(8)})
    assert [entry.path for entry in api.list_repo_tree(REPO)] == [f"{number}.txt" for number in range(8)]
    assert len(hub.asked("/tree/")) == 3


def test_branches_tags_and_commits_are_revisions(hub, api):
    first = hub.add_repo(REPO, {"a.txt": b"1"})
    api.create_branch(REPO, branch="v2/new", revision=first)
    second = hub.add_repo(REPO, {"a.txt": b"2"}, branch="v2/new")
    api.create_tag(REPO, tag="v1.0", revision=first)
    for revision, content in ((None, b"1"), ("v2/new", b"2"), ("v1.0", b"1"), (second, b"2")):
        assert Path(hf_hub_download(REPO, "a.txt", revision=revision)).read_bytes() == content
    refs = api.list_repo_refs(REPO)
    assert {each.name: each.target_commit for each in refs.branches} == {"main": first, "v2/new": second}
    assert [(each.name, each.ref) for each in refs.tags] == [("v1.0", "refs/tags/v1.0")]
    with pytest.raises(HfHubHTTPError, match="Reference already exists"):
        api.create_branch(REPO, branch="v2/new")
    api.create_branch(REPO, branch="v2/new", exist_ok=True)
    commit(api, {"a.txt": b"3"}, revision="v2/new")
    assert hub.files_at(REPO, "v2/new") == {"a.txt": b"3"} and hub.head(REPO) == first
    api.delete_branch(REPO, branch="v2/new")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v2/new")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "b.txt")
    with pytest.raises(BadRequestError, match="no branch"):
        commit(api, {"a.txt": b"4"}, revision=second)


def test_datasets_are_apart_from_models(hub, api):
    sha = hub.add_repo(REPO, {"train.jsonl": b"{}"}, repo_type="dataset")
    assert api.dataset_info(REPO).sha == sha == hub.head(REPO, repo_type="dataset") != hub.head(REPO)
    assert read(snapshot(REPO, repo_type="dataset")) == {"train.jsonl": b"{}"}
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="a.parquet", repo_id=REPO, repo_type="dataset")
    assert hub.files_at(REPO, repo_type="dataset")["a.parquet"] == WEIGHTS and not hub.files_at(REPO)


# Uploads


def test_existing_files_are_not_sent_again(hub, api):
    commit(api, SMALL | LARGE)
    first, hub.requests[:] = hub.head(REPO), []
    assert commit(api, SMALL | LARGE).oid == first == hub.head(REPO)
    assert not hub.asked("PUT") and not hub.asked("/commit/")
    commit(api, SMALL | LARGE | {"config.json": b"{}", "copy.safetensors": WEIGHTS})
    assert not hub.asked("PUT")  # the copy's content exists under another name
    assert sent(hub) == [("file", "config.json"), ("lfsFile", "copy.safetensors")]
    commit(api, {"adapter.safetensors": WEIGHTS + b"\0"})
    assert [request.size for request in hub.asked("PUT")] == [len(WEIGHTS) + 1]


def test_files_can_be_deleted(hub, api):
    commit(api, SMALL | LARGE)
    commit(api, {"new.txt": b""}, deleted=["config.json", "onnx/"])
    assert set(hub.files_at(REPO)) == {*SMALL, *LARGE, "new.txt"} - {"config.json", "onnx/model.onnx"}
    assert sent(hub)[1:] == [("deletedFile", "config.json"), ("deletedFolder", "onnx/")]
    before = hub.head(REPO), hub.files_at(REPO)
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        commit(api, {"more.txt": b"1"}, deleted=["config.json"])
    assert (hub.head(REPO), hub.files_at(REPO)) == before  # all or nothing


def test_a_pull_request_does_not_change_the_branch(hub, api):
    commit(api, SMALL)
    before, foreign = hub.head(REPO), HfApi(endpoint=hub.endpoint, token="hf_other")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        commit(foreign, {"a.txt": b"1"})
    result = commit(foreign, {"a.txt": b"1"}, create_pr=True)
    assert (result.pr_num, result.pr_revision) == (1, "refs/pr/1") and hub.head(REPO) == before
    commit(api, {"b.txt": b"2"}, revision="refs/pr/1")
    assert hub.files_at(REPO, "refs/pr/1") == SMALL | {"a.txt": b"1", "b.txt": b"2"}
    (listed,) = api.list_repo_refs(REPO, include_pull_requests=True).pull_requests
    assert (listed.ref, listed.target_commit) == ("refs/pr/1", hub.head(REPO, "refs/pr/1"))
    opened = api.create_pull_request(REPO, "Another")
    assert (opened.num, opened.git_reference, opened.status) == (2, "refs/pr/2", "draft")
    assert [each.title for each in api.get_repo_discussions(REPO)] == ["Change", "Another"]


def test_a_commit_on_an_outdated_parent_conflicts(hub, api):
    first = hub.head(REPO)
    second = commit(api, {"a.txt": b"1"}, parent_commit=first).oid
    with pytest.raises(HfHubHTTPError, match="412") as caught:
        commit(api, {"a.txt": b"2"}, parent_commit=first)
    assert caught.value.response.status_code == 412 and hub.head(REPO) == second
    commit(api, {"a.txt": b"2"}, parent_commit=second[:7])
    assert hub.files_at(REPO) == {"a.txt": b"2"}


# Rejected requests


def test_only_permitted_users_may_write(hub, api):
    for token, status in ((False, 401), ("hf_read", 403), ("hf_other", 403), ("hf_unknown", 401)):
        one = HfApi(endpoint=hub.endpoint, token=token)
        tries = [lambda one=one: commit(one, {"a.bin": b"1"}), lambda one=one: one.create_branch(REPO, branch="b")]
        tries.append(lambda one=one: one.create_repo("someone/mine"))
        for attempt in tries:
            with pytest.raises(HfHubHTTPError) as caught:
                attempt()
            assert caught.value.response.status_code == status
    assert hub.files_at(REPO) == {} and len(hub.repositories) == 1 and list(hub.repo(REPO).refs) == ["refs/heads/main"]
    assert api.whoami()["name"] == "someone" and api.whoami("hf_read")["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami("hf_unknown")


def test_only_permitted_users_may_read(hub):
    hub.add_repo("someone/secret", {"a.txt": b"1"}, private=True)
    hub.add_repo("someone/gated", {"a.txt": b"1"}, gated=True, granted=("another",))
    for token, status in ((False, 401), ("hf_other", 404)):
        for name in ("someone/secret", "someone/nothing"):
            with pytest.raises(RepositoryNotFoundError) as caught:
                HfApi(endpoint=hub.endpoint, token=token).model_info(name)
            assert caught.value.response.status_code == status
    assert read(snapshot("someone/secret", token="hf_read")) == {"a.txt": b"1"}
    with pytest.raises(GatedRepoError):
        hf_hub_download("someone/gated", "a.txt")
    assert hf_hub_download("someone/gated", "a.txt", token="hf_other")


def post_commit(hub, *lines, token="hf_write"):
    header = {"key": "header", "value": {"summary": "By hand"}}
    body = "\n".join(json.dumps(line) for line in (header, *lines))
    address, headers = f"{hub.endpoint}/api/models/{REPO}/commit/main", {"Authorization": f"Bearer {token}"}
    return get_session().post(address, content=body, headers=headers)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("lfsFile", {"algo": "sha256", "oid": "0" * 64, "size": 3}, "does not exist"),
        ("lfsFile", {"algo": "sha256", "oid": hashlib.sha256(WEIGHTS).hexdigest(), "size": 3}, "bytes, not 3"),
        ("file", {"content": "AAAA", "encoding": "base64"}, "large-file storage"),
        ("file", {"content": "/", "encoding": "base64"}, "not in base64"),
        ("file", {"path": "a/../b.txt", "content": "", "encoding": "base64"}, "Invalid path"),
        ("file", {"path": "there.safetensors/b.txt", "content": "", "encoding": "base64"}, "file and a folder"),
        ("moved", {}, "Unknown operation"),
    ],
)
def test_an_invalid_commit_is_rejected(hub, api, key, value, reason):
    before = hub.add_repo(REPO, {"there.safetensors": WEIGHTS})
    line = {"key": key, "value": {"path": "a.bin", **value}}
    good = {"key": "file", "value": {"path": "good.txt", "content": "", "encoding": "base64"}}
    refused = post_commit(hub, good, line)
    assert refused.status_code == 400 and reason in refused.json()["error"]
    assert hub.head(REPO) == before and hub.files_at(REPO) == {"there.safetensors": WEIGHTS}
    assert post_commit(hub, good, token="hf_other").status_code == 403
    assert post_commit(hub, good).status_code == 200


def test_the_storage_accepts_only_announced_files(hub, api):
    hub.part_size, http = 1 << 17, get_session()
    body = {"operation": "upload", "transfers": ["multipart"], "objects": [{"size": len(BIG)}, {"size": 4}]}
    for each, content in zip(body["objects"], (BIG, b"abcd"), strict=True):
        each["oid"] = hashlib.sha256(content).hexdigest()
    token = {"Authorization": "Bearer hf_write"}
    address = f"{hub.endpoint}/{REPO}.git/info/lfs/objects"
    parts, whole = http.post(f"{address}/batch", json=body, headers=token).json()["objects"]
    href = whole["actions"]["upload"]["href"]
    assert http.put(href, content=b"abcd", headers=token).status_code == 400  # the address is signed
    assert http.put(href, content=iter([b"abcd"])).status_code == 501  # no length
    assert [http.put(href, content=content).status_code for content in (b"abc", b"abcx")] == [400, 400]
    assert http.post(f"{address}/verify", json=body["objects"][1], headers=token).status_code == 404
    assert http.put(href, content=b"abcd").status_code == 200
    assert http.post(f"{address}/verify", json=body["objects"][1], headers=token).status_code == 200
    upload = parts["actions"]["upload"]
    assert len([name for name in upload["header"] if name.isdigit()]) == 10
    came = []
    for part in range(1, 11):
        assert http.post(upload["href"], json={"oid": parts["oid"], "parts": came}).status_code == 400
        response = http.put(upload["header"][f"{part:05d}"], content=BIG[(part - 1) << 17 : part << 17])
        came.append({"partNumber": part, "etag": response.headers["ETag"]})
    wrong = [*came[:-1], {"partNumber": 10, "etag": '"another"'}]
    assert http.post(upload["href"], json={"oid": parts["oid"], "parts": wrong}).status_code == 400
    assert http.post(upload["href"], json={"oid": parts["oid"], "parts": came}).status_code == 200


def test_an_invalid_card_is_rejected(hub, api):
    for card, reason in ((b"license: [", "YAML"), (b"license: Apache 2", "license"), (b"tags: a", "tags")):
        with pytest.raises(ValueError, match=reason):
            commit(api, {"README.md": b"---\n" + card + b"\n---\n"})
    with pytest.raises(ValueError, match="base_model"):
        commit(api, {"README.md": b"---\nbase_model: /home/me/model\n---\n"})
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        commit(api, {"README.md": b"# Memory\n"})


def test_byte_ranges_are_returned(hub, api):
    hub.add_repo(REPO, {"a.txt": b"0123456789", "a.bin": b"0123456789"})
    for name in ("a.txt", "a.bin"):
        address = hf_hub_url(REPO, name)
        for byte_range, content in (("2-4", b"234"), ("7-", b"789"), ("-2", b"89"), ("10-", b"")):
            response = get_session().get(address, headers={"Range": f"bytes={byte_range}"})
            assert (response.status_code, response.content) == (206 if content else 416, content)
