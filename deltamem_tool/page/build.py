"""Assemble the page: its own files, the library of `web/`, the npm packages, and the model."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import ConfigError, ExportError
from deltamem_tool.io import web_files
from deltamem_tool.io.atomic import atomic_folder, check_overwrite
from deltamem_tool.io.formats import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from deltamem_tool.onnx.contract import (
    BFLOAT16,
    DATA_FILE,
    GENERATION_CONFIG_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
)
from deltamem_tool.onnx.locate import find_onnx
from deltamem_tool.onnx.manifest import Manifest
from deltamem_tool.onnx.runtime.validate import check_onnx_folder
from deltamem_tool.page.runtime import FILES, SENTENCE_FILES, WEBGPU_FILES, RuntimeFile, runtime_contents
from deltamem_tool.page.unpacked import write_unpacked

SITE = Path(__file__).with_name("site")
SERVICE_FILE = "service.js"
PAGE_FILE = "index.html"
FILES_FILE = "files.json"  # sizes and hashes with which the page checks the large files
UNPACKED_FILE = "model.wasm.onnx"  # replaces a quantised `MODEL_FILE` in WebAssembly
MAX_DATA_BYTES = 2_145_386_496  # Chrome's largest ArrayBuffer
# Files of a model folder that the library reads.
MODEL_FILES = (
    MODEL_FILE,
    DATA_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    CHAT_TEMPLATE_FILE,
)
_PACKAGES, _CDN_PACKAGES = "packages.js", "packages.cdn.js"  # one of them becomes the library's packages.js
# Placeholders that are replaced.
_SHELL, _VERSION, _FILES = "const SHELL = [];", 'const VERSION = "";', "const FILES = {};"
_SCRIPTS, _CONNECTIONS = "script-src 'self'", "connect-src 'self'"
_ADDRESS = re.compile(r"https?://[\w.-]+(:\d+)?(/[\w.@~-]+)*/?", re.ASCII)  # no character special in a policy or HTML


@dataclass(frozen=True)
class PageResult:
    """The result of `make_page`.

    Args:
        path: the folder of the page.
        files: number of files.
        bytes: size of all files.
        model_bytes: size of the model's files.
        adapter: fingerprint of the adapter whose memories the page can read.
    """

    path: Path
    files: int
    bytes: int
    model_bytes: int
    adapter: str


def make_page(
    onnx: str | Path,
    out: str | Path,
    *,
    runtime: Path | None = None,
    webgpu: bool = True,
    cdn: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> PageResult:
    """Create a folder for any static host: a chat page with the model, which runs in the visitor's browser.

    Args:
        onnx: an ONNX folder, a folder that contains one as `onnx/`, or a Hub id.
        out: the folder to create, whole or not at all.
        runtime: npm's node_modules with the packages that the page needs; by default they are fetched once.
        webgpu: whether the page uses a GPU if there is one; without this, it is 27 MB smaller.
        cdn: URL of a CDN of npm packages, where the file `dist/x.js` of version 1 of the package `p` is at
            `p@1/dist/x.js` below the URL. The browser fetches the packages from there, and runs a file only if it is
            identical to the tested one. By default the packages are in the folder, and the page contacts only its own
            host.
        overwrite: replace `out` if it exists.
        progress: called with a description of each step.

    Raises:
        ExportError: the ONNX folder is damaged, or cannot run in a browser.
        InstallationError: the packages are not available.
        ConfigError: `cdn` is not a valid URL.
        DeltaMemError: `out` already exists.
    """
    check_overwrite(out, overwrite)
    if cdn is not None and not _ADDRESS.fullmatch(cdn):
        raise ConfigError(
            f"{cdn} is not the address of a CDN.",
            "It is inserted into the page's content security policy unchanged.",
            "Pass an address of letters, digits and slashes, such as https://cdn.example.org/npm.",
        )
    folder = find_onnx(onnx)
    manifest = check_onnx_folder(folder)
    check_runs_in_browser(manifest, folder)
    by_sentence = DeltaMemConfig.from_dict(manifest.mechanism).granularity == "sentence"
    wanted = [*FILES, *(WEBGPU_FILES if webgpu else ()), *(SENTENCE_FILES if by_sentence else ())]
    packages = runtime_contents(wanted, runtime, progress)
    with atomic_folder(out, overwrite) as staged:
        _write(staged, folder, {file.name: file for file in wanted}, packages, cdn)
        sizes = {path.relative_to(staged): path.stat().st_size for path in staged.rglob("*") if path.is_file()}
    return PageResult(
        path=Path(out),
        files=len(sizes),
        bytes=sum(sizes.values()),
        model_bytes=sum(size for path, size in sizes.items() if path.parts[0] == "model"),
        adapter=manifest.adapter,
    )


def check_runs_in_browser(manifest: Manifest, folder: Path) -> None:
    """Check that the library of `web/` can run the folder.

    Raises:
        ExportError: the library cannot run the folder.
    """
    interface = manifest.interface
    for unfit, why in (
        (interface.genai, "It is for onnxruntime-genai"),
        (interface.max_length, "Its keys and values are of a fixed length"),
        (interface.logits != "last", "It has logits of every position"),
        (interface.dtype == BFLOAT16, "It is in bfloat16"),
        ((folder / DATA_FILE).stat().st_size > MAX_DATA_BYTES, f"Its weights have more than {MAX_DATA_BYTES} bytes"),
    ):
        if unfit:
            raise ExportError(
                f"{folder} does not run in a page.",
                f"{why}.",
                "Export the adapter with --target web and no other option.",
            )


def _write(out: Path, model: Path, files: dict[str, RuntimeFile], packages: dict[str, bytes], cdn: str | None) -> None:
    for folder in (SITE, web_files.PARTS):
        shutil.copytree(folder, out, dirs_exist_ok=True)
    shutil.copytree(web_files.library(), out / "library")
    runtime = {name: _facts(content) for name, content in packages.items()}
    if cdn is None:
        _keep_packages(out, packages)
    else:
        for name, facts in runtime.items():
            facts["url"] = f"{cdn.rstrip('/')}/{files[name].cdn_path}"
        _name_cdn(out, runtime, cdn)
    (out / "model").mkdir()
    for name in MODEL_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, out / "model" / name)
    write_unpacked(model / MODEL_FILE, out / "model" / UNPACKED_FILE)
    expected = {
        "model": {file.name: _facts_of(file) for file in sorted((out / "model").iterdir())},
        "runtime": {name: facts for name, facts in runtime.items() if name.endswith(".wasm")},
    }
    (out / FILES_FILE).write_text(json.dumps({"expected": expected}, indent=1) + "\n", encoding="utf-8")
    _write_service(out)


def _keep_packages(out: Path, packages: dict[str, bytes]) -> None:
    """Put the packages into the page's own folder."""
    (out / _CDN_PACKAGES).unlink()
    (out / _PACKAGES).rename(out / "library" / _PACKAGES)
    (out / "runtime").mkdir()
    for name, content in packages.items():
        (out / "runtime" / name).write_bytes(content)


def _name_cdn(out: Path, runtime: dict[str, dict[str, Any]], cdn: str) -> None:
    """Make the page fetch the packages from the CDN. It checks each file and runs it from a blob."""
    (out / _PACKAGES).unlink()
    (out / _CDN_PACKAGES).rename(out / "library" / _PACKAGES)
    modules = {name: facts for name, facts in runtime.items() if name.endswith("js")}
    _write_in(out / "library" / _PACKAGES, {_FILES: f"const FILES = {json.dumps(modules)};"})
    address = f"{cdn.rstrip('/')}/"
    _write_in(out / PAGE_FILE, {_SCRIPTS: f"{_SCRIPTS} blob:", _CONNECTIONS: f"{_CONNECTIONS} {address}"})


def _write_in(file: Path, written: dict[str, str]) -> None:
    """Replace texts that occur exactly once in `file`."""
    text = file.read_text(encoding="utf-8")
    for former, new in written.items():
        assert text.count(former) == 1
        text = text.replace(former, new)
    file.write_text(text, encoding="utf-8")


def _write_service(out: Path) -> None:
    """Write the list of files that are cached for offline visits. Its version is a hash of their contents."""
    paths = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    shell = [path for path in paths if _is_shell(path)]
    digests = {path: _facts_of(out / path)["sha256"] for path in shell}
    version = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]
    lines = {_SHELL: f"const SHELL = {json.dumps(['./', *shell])};", _VERSION: f'const VERSION = "{version}";'}
    _write_in(out / SERVICE_FILE, lines)


def _is_shell(path: str) -> bool:
    return path != SERVICE_FILE and not path.startswith(("model/", "runtime/LICENSE")) and not path.endswith(".wasm")


def _facts(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _facts_of(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}
