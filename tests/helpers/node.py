"""Run Node scripts with npm packages, which are fetched once into the user's cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
from filelock import FileLock
from numpy.typing import NDArray

LOCK = "package-lock.json"
NO_ADAPTER = 3  # exit status of graph.mjs
# Types of onnxruntime-web, which stores float16 as uint16.
TYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64, "bool": np.bool_}
_HEADER_LENGTH = struct.Struct("<I")


def node_folder(folder: Path, out: Path) -> Path:
    """Copy the scripts of `folder` to `out`, where they can import the packages of its package-lock.json.

    Skips the test if Node is missing or npm cannot install the packages.
    """
    modules = node_modules(folder)
    out.mkdir()
    for script in folder.glob("*.mjs"):
        shutil.copy(script, out)
    (out / "node_modules").symlink_to(modules, target_is_directory=True)
    return out


def node_modules(folder: Path) -> Path:
    """The packages that the package-lock.json of `folder` names.

    Skips the test if Node is missing or npm cannot install them.
    """
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs Node and npm")
    lock = (folder / LOCK).read_bytes()
    cache = platformdirs.user_cache_path("deltamem-tests", appauthor=False)
    installed = cache / f"npm-{hashlib.sha256(lock).hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "npm.lock"):
        if not (installed / "node_modules").exists():
            with tempfile.TemporaryDirectory(dir=cache) as unfinished:
                for name in ("package.json", LOCK):
                    shutil.copy(folder / name, unfinished)
                command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
                result = subprocess.run(command, cwd=unfinished, capture_output=True, text=True)
                if result.returncode:
                    pytest.skip(f"npm cannot fetch the packages: {result.stderr.partition(chr(10))[0]}")
                installed.mkdir(exist_ok=True)
                Path(unfinished, "node_modules").rename(installed / "node_modules")
    return installed / "node_modules"


class WebGraph:
    """A folder's graph in onnxruntime-web, run by `graph.mjs` in its own process.

    Args:
        scripts: `node_folder` of the script.
        folder: the ONNX folder.
        provider: "wasm" or "webgpu"; the test is skipped if WebGPU has no adapter.
    """

    def __init__(self, scripts: Path, folder: Path, provider: str = "wasm") -> None:
        self._process = subprocess.Popen(
            ["node", "graph.mjs", folder, provider], cwd=scripts, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert self._receive() == {}
        except EOFError:
            self.close()
            if self._process.returncode == NO_ADAPTER:
                pytest.skip("WebGPU needs a Vulkan driver; VK_ICD_FILENAMES may name one, SwiftShader's for example")
            raise

    def __call__(self, feed: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs of one call, by name."""
        names = {np.dtype(of): name for name, of in TYPES.items()}
        arrays = {name: np.ascontiguousarray(array) for name, array in feed.items()}
        header = [[name, names[array.dtype], array.shape, array.nbytes] for name, array in arrays.items()]
        text = json.dumps(header).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(
            b"".join([_HEADER_LENGTH.pack(len(text)), text, *(a.tobytes() for a in arrays.values())])
        )
        self._process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        """End the process."""
        with self._process:
            pass

    def _receive(self) -> dict[str, NDArray[Any]]:
        (length,) = _HEADER_LENGTH.unpack(self._read(_HEADER_LENGTH.size))
        return {
            name: np.frombuffer(self._read(size), TYPES[of]).reshape(shape).copy()
            for name, of, shape, size in json.loads(self._read(length))
        }

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        content = self._process.stdout.read(size)
        if len(content) < size:
            raise EOFError("the script has ended; it says why above")
        return content
