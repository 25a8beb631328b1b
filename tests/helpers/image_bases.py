"""Stand-ins for `FROM python:…` without a registry: a root of Debian packages, or one that borrows this machine's."""

from __future__ import annotations

import ast
import os
import shutil
import site
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from helpers.clean_root import Image, run

SYSTEM = ("bin", "lib", "lib64", "sbin", "usr")
DEBIAN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as in the official image
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy")


@dataclass(frozen=True)
class Tag:
    """`python:3.11-slim-bookworm`."""

    minor: str
    release: str


def tag_of(name: str) -> Tag:
    repository, _, tag = name.partition(":")
    minor, slim, release = tag.split("-")
    assert (repository, slim) == ("python", "slim"), name
    return Tag(minor, release)


def debian(name: str, root: Path) -> Image:
    """The Debian release of the image, with Debian's own Python, from the mirrors that apt uses here."""
    tag = tag_of(name)
    command = ["mmdebstrap", "--variant=minbase", "--include=python3-venv,ca-certificates", tag.release, str(root), "-"]
    result = subprocess.run(command, input=_sources(tag.release), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    image = Image(root, {"PATH": DEBIAN_PATH})
    version = run(image, ["python3", "--version"]).stdout
    assert version.startswith(f"Python {tag.minor}."), f"{name} has another Python than Debian {tag.release}: {version}"
    return image


def borrowed(name: str, root: Path) -> Image:
    """An empty root with this machine's system and this Python, read only."""
    tag_of(name)
    for folder in ("etc", "root"):
        (root / folder).mkdir(parents=True)
    (root / "tmp").mkdir(mode=0o1777)
    (root / "tmp").chmod(0o1777)
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\n")
    lent = {str(path): path for path in (Path("/etc/ld.so.cache"), Path(sys.base_prefix), Path(sys.prefix))}
    for part in (Path("/", part) for part in SYSTEM):
        if part.is_symlink():
            (root / part.name).symlink_to(part.readlink())
        elif part.exists():
            lent = {str(part): part, **lent}
    return Image(root, {"PATH": f"{sys.base_prefix}/bin:{DEBIAN_PATH}"}, borrowed=lent)


def lend_packages(image: Image) -> None:
    """Let the image's virtual environment, once it exists, import the packages of this one after its own."""
    environment = image.path(image.env["VIRTUAL_ENV"])
    for folder in environment.glob("lib/python*/site-packages"):
        (folder / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
        for old in folder.glob("setuptools*"):  # venv's own, before Python 3.12, which is too old for torch
            shutil.rmtree(old)


def pip_settings() -> tuple[dict[str, str], dict[str, Path]]:
    """This machine's pip configuration as environment variables, and the files and folders that it names."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    env = {name: os.environ[name] for name in (*PROXIES, *map(str.upper, PROXIES)) if name in os.environ}
    for line in lines:
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in ("global", "install", ":env:"):
            env["PIP_" + key.upper().replace("-", "_")] = " ".join(str(ast.literal_eval(value)).split())
    words = [word for value in env.values() for word in value.split() if word.startswith(("/", "file:"))]
    paths = [Path(urlsplit(word).path) for word in words]
    paths = [path.parent if path.name == "simple" else path for path in paths]  # an index's files lie beside it
    return env, {str(path): path for path in paths if path.exists()}


def _sources(release: str) -> str:
    """apt's sources for the release, or Debian's usual mirror if this machine has another release."""
    command = ["apt-get", "indextargets", "--format", "$(CODENAME) $(SITE) $(COMPONENT)", "Created-By: Packages"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    sources = [line.split() for line in lines if line.split()[0].split("-")[0] == release]
    known = [f"deb {site} {suite} {component}" for suite, site, component in sources]
    return "\n".join(known or [f"deb http://deb.debian.org/debian {release} main"]) + "\n"
