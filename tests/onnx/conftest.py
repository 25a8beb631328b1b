"""Tiny models exported once: with a memory in every layer, in only the second, and one that writes by message."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from helpers.shared_folder import folder_once
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from deltamem_tool import attach
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.onnx.contract import MANIFEST_FILE
from deltamem_tool.onnx.export import export
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.export.rewrites import JOIN_WEIGHTS
from deltamem_tool.onnx.manifest import Manifest

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TEMPLATE = """{% for message in messages %}
{{ '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""


@dataclass(frozen=True)
class Exported:
    """A model with its tokenizer, and the folder it was exported to."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    manifest: Manifest


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE)


def make_model(kind: str, layers: str | tuple[int, ...], depth: int = 2, **options) -> PreTrainedModel:
    """Layers with random weights, large enough that the memory changes the output."""
    torch.manual_seed(0)
    config_class, model_class = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[
        kind
    ]
    config = config_class(
        vocab_size=256 + len(SPECIAL),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = model_class(config).eval()
    memory = {"rank": 4, "state_heads": 2, "branches": ("q", "v", "o"), "layers": layers, **options}
    adapter = attach(model, DeltaMemConfig(**memory))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)
        # One row keeps nothing, because ONNX Runtime's sigmoid is 0 below -20, and its logarithm is -inf.
        adapter.layers[str(depth - 1)].gate.bias[0] = 40.0
    return model


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _exported("qwen3", make_model("qwen3", "all"), "last", tmp_path_factory)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A Llama whose memory's weights are separate from the base's, as quantisation requires."""
    return _exported("llama", make_model("llama", (1,)), "all", tmp_path_factory, without=JOIN_WEIGHTS)


@pytest.fixture(scope="session")
def message_export(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One layer whose memory writes by message."""
    model = make_model("qwen3", "all", depth=1, granularity="message", couple_lambda=False)
    return _exported("by_message", model, "last", tmp_path_factory)


@pytest.fixture(scope="session")
def portable_export(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The model of `static_export` in standard operators."""
    return _exported("portable", make_model("qwen3", "all", depth=1), "last", tmp_path_factory, target="portable")


@pytest.fixture(scope="session")
def static_export(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One layer, with keys and values of a fixed length."""
    model = make_model("qwen3", "all", depth=1)
    return _exported("fixed", model, "last", tmp_path_factory, max_length=112)


@pytest.fixture(scope="session")
def exported_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Exports one layer under its own name."""

    def export(name: str, memory: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> Exported:
        model = make_model("qwen3", "all", depth=1, **memory).to(dtype)
        return _exported(name, model, "last", tmp_path_factory, **options)

    return export


@pytest.fixture(params=["qwen3", pytest.param("llama", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest) -> Exported:
    return request.getfixturevalue(request.param)


def _exported(
    name: str, model: PreTrainedModel, logits: str, tmp_path_factory: pytest.TempPathFactory, **options: Any
) -> Exported:
    tokenizer = make_tokenizer()

    def export(folder: Path) -> None:
        out, base = folder / "exported", f"someone/tiny-{name}"
        export_onnx(model, tokenizer, out, logits=logits, base_model=base, **options)

    folder = folder_once(tmp_path_factory, name, export) / "exported"
    manifest = Manifest.from_json((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    return Exported(model, tokenizer, folder, manifest)


@pytest.fixture
def folder(qwen3: Exported, tmp_path: Path) -> Path:
    """A copy of Qwen3's folder for the test to damage."""
    return shutil.copytree(qwen3.folder, tmp_path / "copy")


@pytest.fixture
def write_instead(monkeypatch) -> Callable[[Exported], None]:
    """Makes `export_onnx` write a graph that was exported before, for tests that are not about tracing."""
    return partial(_write_instead, monkeypatch)


@pytest.fixture
def no_tracing(write_instead, qwen3):
    write_instead(qwen3)


@pytest.fixture
def no_llama_tracing(write_instead, llama):
    write_instead(llama)


def _write_instead(monkeypatch: pytest.MonkeyPatch, exported: Exported) -> None:
    class Exporter:
        @staticmethod
        def save_program(program, path):
            for name in ("model.onnx", "model.onnx.data"):
                shutil.copy(exported.folder / name, path.with_name(name))

    nothing = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[]), ir_version=10)
    monkeypatch.setattr(export, "trace_model", lambda *args: nothing)
    monkeypatch.setattr(export, "OnnxExporter", Exporter)
