"""An incomplete exported folder raises, and one of an older release can be read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from deltamem_tool.errors import ExportError
from deltamem_tool.onnx.contract import MANIFEST_FILE
from deltamem_tool.onnx.runtime.engine import OnnxModel


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "deltamem_onnx.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_folder_without_a_required_file_raises(folder, name):
    (folder / name).unlink()
    with pytest.raises(ExportError, match=name):
        OnnxModel(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "generation_config.json"])
def test_a_truncated_file_raises(folder, name):
    file = folder / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ExportError):
        OnnxModel(folder)


def test_an_empty_folder_raises(tmp_path):
    with pytest.raises(ExportError, match="lacks"):
        OnnxModel(tmp_path)
    with pytest.raises(ExportError, match="no such folder"):
        OnnxModel(tmp_path / "nowhere")


def test_a_folder_of_release_0_1_still_runs(portable_export, tmp_path):
    """Its graph uses standard operators, as now, and its manifest has no field for packed keys."""
    folder = shutil.copytree(portable_export.folder, tmp_path / "older")
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["format_version"] = 3
    del manifest["quantization"], manifest["interface"]["packed"], manifest["interface"]["positions"]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    older, newer = OnnxModel(folder), OnnxModel(portable_export.folder)
    ids, mask, write = np.array([[65, 66, 67]]), np.ones((1, 3), np.int64), np.ones((1, 3), np.bool_)
    logits = [model.graph.step(ids, mask, write, model.graph.empty_past(1))[0] for model in (older, newer)]
    assert not older.manifest.interface.packed
    assert np.array_equal(*logits)
