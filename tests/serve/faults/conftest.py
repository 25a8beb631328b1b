"""The model and the databases for the servers of these tests."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import run

import pytest
from helpers.shared_folder import folder_once
from serve.faults.server_process import ServerProcess


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The shipped adapter as an ONNX folder, which a server loads in a second; read only."""

    def export(out: Path) -> None:
        command = [sys.executable, "-m", "deltamem_tool", "export", "builtin:adapter", "--out", str(out / "onnx")]
        result = run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    return folder_once(tmp_path_factory, "served", export) / "onnx"


@pytest.fixture(scope="session")
def engine(folder):
    """The same model in this process, to compute conversations alone."""
    from deltamem_tool.onnx.runtime.engine import OnnxModel

    return OnnxModel(folder)


@pytest.fixture
def start(folder, tmp_path):
    """Starts servers of the model in separate processes, which are killed at the end of the test."""
    servers = []

    def start(store: str, *options: str) -> ServerProcess:
        servers.append(ServerProcess(folder, store, tmp_path / f"server-{len(servers)}.log", options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def sqlite_url(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/memories.sqlite"
