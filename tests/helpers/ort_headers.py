"""ONNX Runtime's C++ headers from Debian, downloaded once. The packages on PyPI and npm lack them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import platformdirs
import pytest
from filelock import FileLock

VARIABLE = "ONNXRUNTIME_INCLUDE"  # a folder with the headers
SYSTEM = Path("/usr/include/onnxruntime")
HEADER = "onnxruntime_cxx_api.h"
# The first Debian release with the package. A newer library accepts older headers, which name their API version.
RELEASE, PACKAGE = "trixie", "libonnxruntime-dev"
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"


def ort_include() -> Path:
    """The folder of the headers.

    Skips the test if there are none and apt cannot download Debian's package.
    """
    for folder in (Path(os.environ.get(VARIABLE, SYSTEM)), SYSTEM):
        if (folder / HEADER).is_file():
            return folder
    cache = platformdirs.user_cache_path("deltamem-tests", appauthor=False)
    kept = cache / f"{PACKAGE}-{RELEASE}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=cache) as unfinished:
                _fetch(Path(unfinished))
                Path(unfinished, "package").rename(kept)
    return kept / SYSTEM.relative_to("/")


def _fetch(folder: Path) -> None:
    """Unpack the package into `package` of `folder`, without changing the machine's package lists."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip(f"needs ONNX Runtime's headers ({VARIABLE}), or apt to fetch Debian's {PACKAGE}")
    known = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    addresses = subprocess.run(known, capture_output=True, text=True, check=True).stdout.split()
    mirror = next((address for address in addresses if address.rstrip("/").endswith("/debian")), None)
    if mirror is None:
        pytest.skip(f"needs ONNX Runtime's headers ({VARIABLE}), or Debian's lists of packages: apt-get update")
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "sources").write_text(f"deb [signed-by={KEYS}] {mirror} {RELEASE} main\n")
    options = {
        "Dir::Etc::SourceList": folder / "sources",
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder,
        "APT::Sandbox::User": "",
        "APT::Update::Error-Mode": "any",
    }
    apt = ["apt-get", "-q", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]
    for command in ([*apt, "update"], [*apt, "download", PACKAGE]):
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"apt cannot fetch Debian's {PACKAGE}: {result.stderr.partition(chr(10))[0]}")
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package, folder / "package"], check=True)
