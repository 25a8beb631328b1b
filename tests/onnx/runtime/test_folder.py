"""An exported folder that is not whole is refused."""

from __future__ import annotations

import pytest

from deltamem_tool.errors import ExportError
from deltamem_tool.onnx.runtime.engine import OnnxModel


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "deltamem_onnx.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_folder_that_lacks_a_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(ExportError, match=name):
        OnnxModel(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "generation_config.json"])
def test_a_file_that_is_cut_short_is_refused(folder, name):
    file = folder / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ExportError):
        OnnxModel(folder)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ExportError, match="lacks"):
        OnnxModel(tmp_path)
    with pytest.raises(ExportError, match="no such folder"):
        OnnxModel(tmp_path / "nowhere")
