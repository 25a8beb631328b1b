"""The shipped adapter as an ONNX folder in the user's cache: exported once, completely or not at all."""

from __future__ import annotations

import platformdirs
import pytest

from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.cli.engines import shipped_engine
from deltamem_tool.errors import ExportError
from deltamem_tool.io.names import BACKBONE
from deltamem_tool.onnx.export import export, shipped
from deltamem_tool.onnx.export.shipped import is_shipped, shipped_folder

ADAPTER = "builtin:adapter"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.slow
def test_the_shipped_adapter_is_exported_once_and_then_cached(cache, monkeypatch):
    installed = {"cpu", "export"}
    monkeypatch.setattr("deltamem_tool.cli.engines.is_installed", lambda *extras: installed.issuperset(extras))
    engine = shipped_engine(ADAPTER)
    assert engine.folder == shipped_folder(ADAPTER) and engine.folder.is_relative_to(cache)
    assert engine.adapter == read_adapter(ADAPTER).fingerprint
    written = (engine.folder / "model.onnx").stat().st_mtime_ns
    installed.remove("export")
    assert (shipped_engine(ADAPTER).folder / "model.onnx").stat().st_mtime_ns == written
    installed.remove("cpu")
    assert shipped_engine(ADAPTER) is None


@pytest.mark.slow
def test_a_failed_export_leaves_nothing(cache, monkeypatch):
    def fail(plan, path):
        path.write_bytes(b"a part")
        raise ExportError("It was interrupted.", "", "")

    killed = cache / "onnx" / f".{shipped_folder(ADAPTER).name}.x"  # left by a killed program
    killed.mkdir(parents=True)
    monkeypatch.setattr(export, "_write_graph", fail)
    with pytest.raises(ExportError, match="interrupted"):
        shipped_engine(ADAPTER)
    assert list((cache / "onnx").iterdir()) == []


def test_another_version_has_another_folder(cache, monkeypatch):
    folder = shipped_folder(ADAPTER)
    assert folder == shipped_folder(ADAPTER) != shipped_folder("builtin:smollm2-adapter")
    monkeypatch.setattr(shipped, "__version__", "0.0.0")
    assert shipped_folder(ADAPTER) != folder and shipped_folder(ADAPTER).parent == folder.parent


def test_the_backbone_has_no_exported_folder(cache, monkeypatch):
    assert is_shipped(ADAPTER) and not is_shipped(BACKBONE) and not is_shipped("adapter")
    assert shipped_engine(BACKBONE) is None and not cache.exists()
    monkeypatch.setattr("deltamem_tool.cli.engines.is_installed", lambda *extras: "export" not in extras)
    assert shipped_engine(ADAPTER) is None and not cache.exists()
