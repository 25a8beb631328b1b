"""The configuration for onnxruntime-genai, which this package writes and never reads: validation of untrusted files."""

from __future__ import annotations

import json
import shutil

import pytest

from deltamem_tool.errors import ExportError
from deltamem_tool.onnx.contract import GENAI_CONFIG_FILE, MODEL_FILE
from deltamem_tool.onnx.export import genai
from deltamem_tool.onnx.runtime import validate as trust
from deltamem_tool.onnx.runtime.validate import check_onnx_folder


@pytest.fixture
def folder(message_export, tmp_path):
    """A copy to damage."""
    return shutil.copytree(message_export.folder, tmp_path / "copy")


GENAI = {
    "model": {
        "type": "decoder",
        "decoder": {
            "filename": MODEL_FILE,
            "session_options": {"log_severity_level": 3, "provider_options": []},
            "inputs": {"input_ids": "input_ids"},
        },
    },
    "search": {"do_sample": False},
}


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model.decoder.filename", "../other.onnx", "a graph other than"),
        ("model.decoder.session_options.custom_ops_library", "evil.so", "custom_ops_library"),
        ("model.decoder.session_options.config_entries", {}, "config_entries"),
        ("model.decoder.session_options.provider_options", [{"cuda": {}}], "chooses a provider"),
        ("model.decoder.session_options", None, "no object"),
        ("model.decoder.pipeline", [], "pipeline"),
        ("model.vision", {"filename": "x"}, "vision"),
        ("model", {}, "no object model.decoder"),
        ("model", [], "no object"),
        ("engine", {}, "engine"),
    ],
)
def test_unsafe_configurations_for_onnxruntime_genai_raise(folder, path, value, says):
    (folder / GENAI_CONFIG_FILE).write_text(json.dumps(GENAI))
    check_onnx_folder(folder)
    config = json.loads(json.dumps(GENAI))
    *places, last = path.split(".")
    part = config
    for place in places:
        part = part[place]
    part[last] = value
    (folder / GENAI_CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ExportError, match=says):
        check_onnx_folder(folder)


def test_exported_configurations_for_onnxruntime_genai_pass(qwen3, tmp_path):
    qwen3.model.generation_config.eos_token_id = 257
    try:
        content = genai.configuration(qwen3.model, qwen3.tokenizer, qwen3.manifest.interface)
    finally:
        qwen3.model.generation_config.eos_token_id = None
    genai.write_config(tmp_path, content)
    trust.check_genai_config(tmp_path / GENAI_CONFIG_FILE)
