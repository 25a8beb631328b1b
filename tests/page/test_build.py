"""`deltamem page`: the folder is complete or absent, and contains only files that were tested."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import tarfile

import pytest
from helpers.hosting import hosting
from helpers.node import node_modules
from helpers.publishing import onnx_folder
from helpers.tiny import listing
from helpers.web_library import LIBRARY, SCRIPTS

from deltamem_tool.errors import ConfigError, DeltaMemError, ExportError, InstallationError
from deltamem_tool.onnx.contract import DATA_FILE, MANIFEST_FILE
from deltamem_tool.page import build, runtime
from deltamem_tool.page.build import FILES_FILE, PAGE_FILE, make_page
from deltamem_tool.page.runtime import (
    FILES,
    PACKAGES,
    SENTENCE_FILES,
    WEBGPU_FILES,
    Package,
    RuntimeFile,
    runtime_contents,
)

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def packages():
    return node_modules(SCRIPTS)


def test_the_packages_are_those_of_the_library_and_the_tests():
    locked = [
        json.loads((folder / "package-lock.json").read_text("utf-8"))["packages"] for folder in (LIBRARY, SCRIPTS)
    ]
    for package in PACKAGES:
        for entries in locked:
            entry = entries[f"node_modules/{package.name}"]
            assert (entry["version"], entry["integrity"]) == (package.version, f"sha512-{package.sha512}")


@pytest.mark.node
@pytest.mark.slow
def test_the_page_is_whole_and_asks_nobody_else(web_folder, packages, tmp_path):
    result = make_page(web_folder, tmp_path / "site", runtime=packages)
    site = tmp_path / "site"
    assert result.bytes == sum(listing(site).values()) and 40 * MEGABYTE < result.bytes < 50 * MEGABYTE
    expected = json.loads((site / "files.json").read_text("utf-8"))["expected"]
    for part, files in expected.items():
        for name, facts in files.items():
            content = (site / part / name).read_bytes()
            assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert DATA_FILE in expected["model"] and len(expected["runtime"]) == 2
    own = [
        path for path in site.rglob("*") if path.suffix in (".js", ".html", ".css") and path.parent.name != "runtime"
    ]
    assert len(own) > 20
    for path in own:
        text = path.read_text("utf-8")
        assert not re.search(r"(?<!xmlns=\")https?://(?!arxiv)|\sstyle=|\son\w+=\"|eval\(|innerHTML", text), path
    shell = json.loads(re.search(r"const SHELL = (.*);", (site / "service.js").read_text("utf-8"))[1])
    assert all((site / path).exists() for path in shell)
    assert {"./", "index.html", "site.js", "library/index.js", "files.json", "runtime/jinja.js"} <= set(shell)
    assert not any(path.startswith("model/") or path.endswith(".wasm") for path in shell)


@pytest.mark.node
@pytest.mark.slow
def test_without_webgpu_it_is_smaller(web_folder, packages, tmp_path):
    result = make_page(web_folder, tmp_path / "site", runtime=packages, webgpu=False)
    assert result.bytes < 20 * MEGABYTE
    assert not list((tmp_path / "site").rglob("*webgpu*")) + list((tmp_path / "site").rglob("*asyncify*"))


@pytest.mark.node
@pytest.mark.slow
def test_what_fails_leaves_nothing(web_folder, packages, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(DeltaMemError, match="already exists"):
        make_page(web_folder, tmp_path / "taken", runtime=packages)
    with pytest.raises(InstallationError, match="does not have @huggingface/jinja"):
        make_page(web_folder, tmp_path / "site", runtime=tmp_path)
    changed = tmp_path / "changed"
    for file in FILES:
        path = changed / file.package.name / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(packages / file.package.name / file.path, path)
    (changed / "onnxruntime-web/dist/ort.wasm.bundle.min.mjs").write_text("alert(1)")
    with pytest.raises(InstallationError, match=r"is not the file of onnxruntime-web 1\."):
        make_page(web_folder, tmp_path / "site", runtime=changed)
    damaged = shutil.copytree(web_folder, tmp_path / "damaged")
    (damaged / DATA_FILE).write_bytes((web_folder / DATA_FILE).read_bytes()[:-1])
    with pytest.raises(ExportError):
        make_page(damaged, tmp_path / "site", runtime=packages)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed", "damaged", "taken"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"interface": {"max_length": 64}}, "of a fixed length"),
        ({"interface": {"logits": "all"}}, "logits of every position"),
        ({"interface": {"dtype": "bfloat16"}}, "in bfloat16"),
    ],
)
def test_folders_that_no_browser_runs_are_refused(web_folder, tmp_path, change, why):
    other = shutil.copytree(web_folder, tmp_path / "other")
    manifest = json.loads((other / MANIFEST_FILE).read_text("utf-8"))
    for part, values in change.items():
        manifest[part] |= values
    (other / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ExportError, match=why):
        make_page(other, tmp_path / "site", runtime=tmp_path)
    assert not (tmp_path / "site").exists()


@pytest.fixture
def graph(tmp_path):
    """An ONNX folder whose graph is empty."""
    return onnx_folder(tmp_path / "graph")


@pytest.fixture
def small_packages(monkeypatch):
    """Replaces the npm packages by a few bytes."""

    def contents(files, *others):
        return {file.name: file.name.encode() for file in files}

    monkeypatch.setattr(build, "runtime_contents", contents)


def test_texts_are_split_where_the_adapter_writes_by_sentence_alone(graph, small_packages, tmp_path):
    make_page(graph, tmp_path / "by-token")
    manifest = json.loads((graph / MANIFEST_FILE).read_text("utf-8"))
    manifest["mechanism"]["granularity"] = "sentence"
    (graph / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
    make_page(graph, tmp_path / "by-sentence")
    runtimes = [{path.name for path in (tmp_path / name / "runtime").iterdir()} for name in ("by-token", "by-sentence")]
    assert runtimes[1] - runtimes[0] == {file.name for file in SENTENCE_FILES} and runtimes[0] < runtimes[1]


CDN = "https://cdn.example.org/npm"


def test_a_cdn_is_named_with_the_hash_of_every_file(graph, small_packages, tmp_path):
    make_page(graph, tmp_path / "site", cdn=CDN)
    site = tmp_path / "site"
    assert not (site / "runtime").exists() and not (site / "packages.cdn.js").exists()
    policy = re.search(
        r'http-equiv="Content-Security-Policy"\s+content="([^"]*)"', (site / PAGE_FILE).read_text("utf-8")
    )
    assert f"connect-src 'self' {CDN}/;" in policy[1] and policy[1].count("://") == 1
    modules = json.loads(re.search(r"const FILES = (.*);", (site / "library" / "packages.js").read_text("utf-8"))[1])
    binaries = json.loads((site / FILES_FILE).read_text("utf-8"))["expected"]["runtime"]
    for file in (*FILES, *WEBGPU_FILES):
        if file.name.startswith("LICENSE"):
            continue
        facts = (binaries if file.name.endswith(".wasm") else modules)[file.name]
        assert facts["sha256"] == hashlib.sha256(file.name.encode()).hexdigest()
        assert facts["url"] == f"{CDN}/{file.package.name}@{file.package.version}/{file.path}"


@pytest.mark.parametrize(
    "address", ["cdn", "ftp://cdn.org", "https://cdn.org/npm?x", "https://a b", 'https://a";x', ""]
)
def test_what_is_not_the_address_of_a_cdn_is_refused(tmp_path, address):
    with pytest.raises(ConfigError, match="is not the address of a CDN"):
        make_page(tmp_path, tmp_path / "site", cdn=address)


# Downloads


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """An npm registry with one package of one file."""
    content = b"export const one = 1;\n"
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tarball:
        entry = tarfile.TarInfo("package/dist/one.js")
        entry.size = len(content)
        tarball.addfile(entry, io.BytesIO(content))
    package = Package("@some/one", "1.0.0", base64.b64encode(hashlib.sha512(archive.getvalue()).digest()).decode())
    path = tmp_path / "registry" / package.address
    path.parent.mkdir(parents=True)
    path.write_bytes(archive.getvalue())
    monkeypatch.setattr(runtime.platformdirs, "user_cache_path", lambda *names, **options: tmp_path / "cache")
    with hosting(tmp_path / "registry") as address:
        monkeypatch.setenv(runtime.REGISTRY_VARIABLE, f"{address}/")
        yield path, RuntimeFile("one.js", package, "dist/one.js", hashlib.sha256(content).hexdigest()), content


def test_packages_are_fetched_once(registry):
    tarball, file, content = registry
    messages = []
    assert runtime_contents([file], progress=messages.append) == {"one.js": content}
    tarball.unlink()
    assert runtime_contents([file], progress=messages.append) == {"one.js": content}
    assert messages == ["Fetching @some/one 1.0.0 from npm"]


def test_another_package_is_refused(registry, tmp_path):
    tarball, file, _ = registry
    tarball.write_bytes(tarball.read_bytes() + b" ")
    with pytest.raises(InstallationError, match="not the package that was tested"):
        runtime_contents([file])
    tarball.unlink()
    with pytest.raises(InstallationError, match=r"(?s)cannot be fetched from npm.*404"):
        runtime_contents([file])
    assert not (tmp_path / "cache").exists()


def test_a_cached_file_that_was_changed_is_fetched_again(registry, tmp_path):
    _, file, content = registry
    runtime_contents([file])
    (cached_file,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    cached_file.write_bytes(b"alert(1)")
    assert runtime_contents([file]) == {"one.js": content}


def test_every_file_is_named_once():
    names = [file.name for file in (*FILES, *WEBGPU_FILES, *SENTENCE_FILES)]
    assert len(set(names)) == len(names)
