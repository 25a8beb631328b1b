"""Datasets of the Hub, over HTTP with the Hub's own client."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.talks import TALK, TOOLS
from tiny import write_jsonl

_READ = """
import json, sys
from deltamem_tool.data import read_episodes
from deltamem_tool.errors import DataError

for options in json.load(sys.stdin):
    try:
        loaded = read_episodes(**options)
        print(json.dumps([[each.where, each.history, each.exchanges] for each in loaded.episodes]))
    except DataError as error:
        print(json.dumps([error.what, error.why, error.next]))
"""


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as `datasets` needs to find and fetch the files of a dataset."""

    repositories: dict[str, dict[str, tuple[str, Path]]]  # (commit, folder) by revision by name
    asked: list[str]

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_POST(self) -> None:
        self.sent = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[2:] if is_api else parts[1:]  # after api/datasets, or datasets
        name, rest = "/".join(parts[:2]), parts[2:]
        revisions = self.repositories.get(name, {})
        wanted = rest[1] if len(rest) > 1 else "main"
        found = [place for revision, place in revisions.items() if wanted in (revision, place[0])]
        if not found:
            return self.send(404, {"X-Error-Code": "RevisionNotFound" if revisions else "RepoNotFound"}, b"{}", body)
        commit, folder = found[0]
        headers = {"Content-Type": "application/json", "X-Repo-Commit": commit}
        if not is_api:
            file = folder / "/".join(rest[2:])
            if not file.is_file():
                return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
            if body:
                self.asked.append(f"{commit[0]}/{file.name}")
            return self.send(200, {**headers, "ETag": f'"{commit[:8]}-{file.name}"'}, file.read_bytes(), body)
        if rest[:1] == ["tree"]:
            below = folder / "/".join(rest[2:])
            if not below.is_dir():
                return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"{}", body)
            said = [self.entry(folder, path) for path in sorted(below.iterdir())]
        elif rest[:1] == ["paths-info"]:
            said = [self.entry(folder, path) for path in folder.rglob("*") if path.name in self.sent]
        else:
            files = [{"rfilename": str(path.relative_to(folder))} for path in folder.rglob("*") if path.is_file()]
            said = {"id": name, "sha": commit, "siblings": files}
        self.send(200, headers, json.dumps(said).encode(), body)

    def entry(self, folder: Path, path: Path) -> dict:
        kind = {"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory"}
        return {**kind, "path": str(path.relative_to(folder)), "oid": path.name}

    def send(self, code: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What one process reads of the Hub, one try after the other; and which files it asked for."""
    root = tmp_path_factory.mktemp("hub")
    first, second = root / "first" / "data", root / "second"
    first.mkdir(parents=True)
    second.mkdir()
    for split, talks in (("train", [TALK, TOOLS]), ("test", [TALK[:2], TALK])):
        pq.write_table(pa.Table.from_pylist([{"messages": t} for t in talks]), first / f"{split}-00000.parquet")
    write_jsonl(second / "train.jsonl", [TALK * 2])
    commits = {"main": ("1" * 40, root / "first"), "v2": ("2" * 40, second)}
    asked: list[str] = []
    handler = type("Hub", (_Hub,), {"repositories": {"someone/talks": commits}, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tries = {
        "train": {"path": "someone/talks"},
        "some of it": {"path": "someone/talks", "split": "train[1:]"},
        "skipped": {"path": "someone/talks", "split": "test", "skip_bad_rows": True},
        "bad row": {"path": "someone/talks", "split": "test"},
        "revision": {"path": "someone/talks", "revision": "v2", "supervise": "all"},
        "no split": {"path": "someone/talks", "split": "validation"},
        "no revision": {"path": "someone/talks", "revision": "v3"},
        "no dataset": {"path": "someone/nothing"},
    }
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(root / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _READ],
        input=json.dumps(list(tries.values())),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=environment,
        cwd=root,
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(tries, lines, strict=True)), asked


def test_rows_of_a_split(said):
    read, asked = said
    first, second = read["train"]
    assert first == ["someone/talks[train] row 1", TALK[:2], [TALK[2:]]]
    assert second[0] == "someone/talks[train] row 2" and second[1] == TOOLS[:2]
    assert [message["role"] for message in second[2][0]] == ["user", "assistant", "tool", "assistant"]
    assert read["some of it"] == [["someone/talks[train[1:]] row 1", *second[1:]]]
    assert asked.count("1/train-00000.parquet") == 1


def test_rows_of_a_revision(said):
    read, _ = said
    assert [len(history) for _, history, _ in read["revision"]] == [2, 4, 6]


def test_bad_rows_are_named(said):
    read, _ = said
    what, why, after = read["bad row"]
    assert what == "someone/talks[test] row 1 has no history." and why and after
    assert [where for where, _, _ in read["skipped"]] == ["someone/talks[test] row 2"]


def test_what_is_not_there_is_named(said):
    read, _ = said
    what, why, after = read["no split"]
    assert what == "The dataset someone/talks has no split 'validation'." and after
    assert "train" in why and "test" in why
    for name, missing in (("no revision", "v3"), ("no dataset", "someone/nothing")):
        what, why, after = read[name]
        assert "no such dataset" in what and missing in why and after
