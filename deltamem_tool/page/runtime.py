"""The npm packages that the page needs: their files, the contents of these, and where they come from.

They take 41 MB, so no Python package carries them. Each file is identified by its SHA-256, so that wherever it comes
from, it is the tested one.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx2
import platformdirs

from deltamem_tool.errors import InstallationError, first_line
from deltamem_tool.io.atomic import write_atomically
from deltamem_tool.io.names import expand_user

REGISTRY_VARIABLE = "npm_config_registry"  # read by npm, too
REGISTRY = "https://registry.npmjs.org"
MAX_TARBALL_BYTES = 128 * 2**20
TIMEOUT = 60.0  # seconds without receiving a byte


@dataclass(frozen=True)
class Package:
    """A package of npm.

    Args:
        name: its name on npm.
        version: the tested version.
        sha512: SHA-512 of its tarball in base64, as in npm's `integrity`.
    """

    name: str
    version: str
    sha512: str

    @property
    def address(self) -> str:
        """The path of its tarball in a registry."""
        return f"{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"


@dataclass(frozen=True)
class RuntimeFile:
    """A file of the page that comes from a package.

    Args:
        name: its name in the page's folder.
        package: the package.
        path: its path in the package.
        sha256: SHA-256 of its content.
    """

    name: str
    package: Package
    path: str
    sha256: str

    @property
    def cdn_path(self) -> str:
        """The path below the URL of a CDN of npm packages."""
        return f"{self.package.name}@{self.package.version}/{self.path}"


_JINJA = Package(
    "@huggingface/jinja",
    "0.5.11",
    "YzEzwM5oQf4r0vs7ifWQ+yuVR1YkAHrjERQ+a8WRsStHHp4NRBg+NesjiFc+X2AFUpRvvrIeHDS1xFy9jY/IjQ==",
)
_TOKENIZERS = Package(
    "@huggingface/tokenizers",
    "0.2.0",
    "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
)
_ORT = Package(
    "onnxruntime-web",
    "1.30.0",
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
)
_SENTENCEX = Package(
    "sentencex-wasm",
    "0.1.31",
    "fzHf8TMt3YNINIx+aF2NLnkY5JADmxhs/nGIyV7gen41n6YHuA8A8/oHVEg88IJ9lXV6TG0kvgwNJZiiRkVP4A==",
)
PACKAGES = (_JINJA, _TOKENIZERS, _ORT, _SENTENCEX)


def _of_ort(name: str, sha256: str) -> RuntimeFile:
    return RuntimeFile(name, _ORT, f"dist/{name}", sha256)


FILES = (
    RuntimeFile(
        "jinja.js", _JINJA, "dist/index.js", "c8871915dfa68f976c11540c33fc9341c0810ebe29adb7027b8d51f2a8044936"
    ),
    RuntimeFile("LICENSE-jinja", _JINJA, "LICENSE", "d6e7b19451c1b3d1d66353bb4b1274138953b3bfd9ae60c56e77b1f548796982"),
    RuntimeFile(
        "tokenizers.min.mjs",
        _TOKENIZERS,
        "dist/tokenizers.min.mjs",
        "258e46332101335ce8d95aed7745b19ac3b46d37f3e159a89cf894c2ea9b1d3a",
    ),
    RuntimeFile(
        "LICENSE-tokenizers", _TOKENIZERS, "LICENSE", "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"
    ),
    _of_ort("ort.wasm.bundle.min.mjs", "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90"),
    _of_ort("ort-wasm-simd-threaded.wasm", "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"),
)
# Files that the page needs to use a GPU.
WEBGPU_FILES = (
    _of_ort("ort.webgpu.bundle.min.mjs", "0730816731ce2cdfb06f273da065d4a1c7091eb9d1756a83b2916c8a89d015e2"),
    _of_ort("ort-wasm-simd-threaded.asyncify.wasm", "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da"),
)
# Files that the page needs to split texts into sentences, if the adapter writes by sentence.
SENTENCE_FILES = (
    RuntimeFile(
        "sentencex_wasm.js",
        _SENTENCEX,
        "sentencex_wasm.js",
        "91cd634a188f90049043258c56c64311da4d63b427914fc5633ed0041c65d2e3",
    ),
    RuntimeFile(
        "sentencex_wasm_bg.wasm",
        _SENTENCEX,
        "sentencex_wasm_bg.wasm",
        "71bb80e70322706ebb74915f64184f4e219248340142c5bbd43f63f08396c60a",
    ),
    RuntimeFile(
        "LICENSE-sentencex", _SENTENCEX, "LICENSE", "d6d192c000d71eb9364a2b884d76b5742ebe5bc8d17f93a0e14dba59e4c909ea"
    ),
)


def runtime_contents(
    files: Iterable[RuntimeFile], node_modules: Path | None = None, progress: Callable[[str], None] = lambda _: None
) -> dict[str, bytes]:
    """Return the content of each file, by its name in the page's folder.

    Args:
        files: files of `FILES`, `WEBGPU_FILES` and `SENTENCE_FILES`.
        node_modules: folder in which npm has installed the packages. By default they are fetched once into the user's
            cache, from npm's registry or from the one in the variable `npm_config_registry`.
        progress: called before a package is fetched.

    Raises:
        InstallationError: a file cannot be fetched, or is not the tested one.
    """
    if node_modules is not None:
        folder = expand_user(node_modules)
        return {file.name: _in_folder(file, folder) for file in files}
    contents: dict[str, bytes] = {}
    fetched: dict[Package, bytes] = {}
    for file in files:
        cache_file = platformdirs.user_cache_path("deltamem", appauthor=False) / "npm" / file.sha256
        content = cache_file.read_bytes() if cache_file.is_file() else None
        if content is None or not _is_tested(file, content):
            if file.package not in fetched:
                progress(f"Fetching {file.package.name} {file.package.version} from npm")
                fetched[file.package] = _tarball(file.package)
            content = _in_tarball(file, fetched[file.package])
            write_atomically(cache_file, content)
        contents[file.name] = content
    return contents


def _in_folder(file: RuntimeFile, folder: Path) -> bytes:
    path = folder / file.package.name / file.path
    install = f"npm install {' '.join(f'{package.name}@{package.version}' for package in PACKAGES)}"
    if not path.is_file():
        raise InstallationError(
            f"{folder} does not have {file.package.name}/{file.path}.",
            "It is not npm's node_modules, or the packages are not installed there.",
            f"Install them: {install}",
        )
    content = path.read_bytes()
    if not _is_tested(file, content):
        raise InstallationError(
            f"{path} is not the file of {file.package.name} {file.package.version}.",
            "The page was tested with that version.",
            f"Install it: {install}",
        )
    return content


def _tarball(package: Package) -> bytes:
    registry = os.environ.get(REGISTRY_VARIABLE) or REGISTRY
    address = f"{registry.rstrip('/')}/{package.address}"
    content = bytearray()
    try:
        with httpx2.stream("GET", address, follow_redirects=True, timeout=TIMEOUT) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_TARBALL_BYTES:
                    raise _fetch_error(package, f"It is larger than {MAX_TARBALL_BYTES} bytes")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise _fetch_error(package, f"{address}: {first_line(error)}") from error
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    if digest != package.sha512:
        raise _fetch_error(package, f"The file at {address} is not the package that was tested")
    return bytes(content)


def _in_tarball(file: RuntimeFile, tarball: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as archive:
        member = archive.extractfile(f"package/{file.path}")
        assert member is not None  # the tarball is the one that was tested
        content = member.read()
    assert _is_tested(file, content)
    return content


def _is_tested(file: RuntimeFile, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == file.sha256


def _fetch_error(package: Package, why: str) -> InstallationError:
    return InstallationError(
        f"{package.name} {package.version} cannot be fetched from npm.",
        f"{why}.",
        "Check the network, or pass --runtime with the node_modules of a machine that has network access.",
    )
