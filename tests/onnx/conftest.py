"""Two tiny models exported once: Qwen3 with a memory in every layer, Llama with one in its second layer alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.onnx import export
from deltamem_tool.onnx.contract import Manifest
from deltamem_tool.onnx.export import export_onnx
from deltamem_tool.surgery import attach

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
    """One token a byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE)


def make_model(kind: str, layers: str | tuple[int, ...]) -> PreTrainedModel:
    """Two layers of random weights, large enough that what the memory says changes what the model says."""
    torch.manual_seed(0)
    config_class, model_class = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[
        kind
    ]
    config = config_class(
        vocab_size=256 + len(SPECIAL),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = model_class(config).eval()
    adapter = attach(model, DeltaMemConfig(rank=4, state_heads=2, heads=("q", "v", "o"), layers=layers))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)
        # One row keeps nothing: ONNX Runtime's sigmoid is 0 from -20 on, and its logarithm is -inf.
        adapter.layers["1"].gate.bias[0] = 40.0
    return model


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _exported("qwen3", "all", "last", tmp_path_factory)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _exported("llama", (1,), "all", tmp_path_factory)


def _exported(
    kind: str, layers: str | tuple[int, ...], logits: str, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    model, tokenizer = make_model(kind, layers), make_tokenizer()
    folder = tmp_path_factory.mktemp(kind) / "exported"
    manifest = export_onnx(model, tokenizer, folder, logits=logits, base_model=f"someone/tiny-{kind}")
    return Exported(model, tokenizer, folder, manifest)


@pytest.fixture
def no_tracing(monkeypatch, qwen3):
    """`export_onnx` writes the graph that was exported already: tracing is not what these tests are about."""

    class Exporter:
        @staticmethod
        def save_program(program, path):
            for name in ("model.onnx", "model.onnx.data"):
                shutil.copy(qwen3.folder / name, path.with_name(name))

    monkeypatch.setattr(export, "traced", lambda *args: None)
    monkeypatch.setattr(export, "OnnxExporter", Exporter)
