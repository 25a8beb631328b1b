"""Models, tokenizers and checkpoints small enough to be created in a test."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path

import torch
from backbone import CHAT_TEMPLATE as CHAT_TEMPLATE
from backbone import build_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Lfm2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool.memory.adapter import DeltaMemAdapter

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
PAD, END = 0, 1
VOCABULARY = 96  # of models that need no tokenizer
ARCHITECTURES = ("qwen3", "llama", "smollm3")
_CONFIGS = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
    "smollm3": SmolLM3Config,
    "lfm2": Lfm2Config,
}
# Their features: heads wider than the hidden size, grouped keys, a layer without positions, a convolution.
_OWN = {
    "qwen2": {"num_key_value_heads": 2},  # biases of q, k and v
    "qwen3": {"head_dim": 16, "num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 1},
    "smollm3": {"num_key_value_heads": 4, "no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 2},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},  # a hybrid
}


def tiny_config(name: str = "qwen3", **changes) -> PretrainedConfig:
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # with 0.02, the logits of so small a model would be almost equal
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "bos_token_id": None,
    }
    return _CONFIGS[name](**{**options, **_OWN[name], **changes})


def tiny_model(name: str = "qwen3", seed: int = 0, attention: str = "sdpa", **changes) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = tiny_config(name, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def patched_model(name: str = "qwen3", seed: int = 0, attention: str = "sdpa", **options) -> PreTrainedModel:
    """A tiny model with a memory whose weights are all random, none at its initial value."""
    model = tiny_model(name, seed, attention)
    randomise(attach(model, DeltaMemConfig(**{"rank": 4, **options})), seed)
    return model


@torch.no_grad()
def randomise(adapter: DeltaMemAdapter, seed: int = 0) -> DeltaMemAdapter:
    generator = torch.Generator().manual_seed(seed + 1)
    for name, weight in adapter.named_parameters():
        random = torch.randn(weight.shape, generator=generator)
        if name.endswith(("bias", "scale_raw")):
            weight.copy_(random)
        elif name.endswith("o_norm.weight"):
            weight.copy_(1 + random * 0.3)
        else:
            weight.copy_(random * 0.3)
    return adapter


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random text `[batch, length]` without special tokens."""
    generator = torch.Generator().manual_seed(seed + 2)
    return torch.randint(len(SPECIAL), VOCABULARY, (batch, length), generator=generator)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the backbone, with a token for tools."""
    return build_tokenizer(SPECIAL)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer with another chat template."""
    other = copy(tokenizer)
    other.chat_template = template
    return other


def save_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **options) -> Path:
    """A base model on disk, with `tokenizer` if there is one."""
    if tokenizer is not None:
        options["vocab_size"] = len(tokenizer)
        tokenizer.save_pretrained(folder)
    tiny_model(**options).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, conversations: list[list[dict[str, str]]]) -> Path:
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in conversations]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def listing(folder: Path) -> dict[str, int]:
    """Every path below `folder` with its size, to check that a failed command changes nothing."""
    return {
        str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    } | {f"{path.relative_to(folder)}/": 0 for path in folder.rglob("*") if path.is_dir()}


def as_bin(model, folder: Path, pieces: int = 1, zipped: bool = True) -> Path:
    """Save a checkpoint in torch's format, which was used before safetensors."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    weights = dict(model.state_dict())
    if pieces == 1:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return folder
    names = {f"pytorch_model-{i + 1:05d}-of-{pieces:05d}.bin": list(weights)[i::pieces] for i in range(pieces)}
    for file, own in names.items():
        torch.save({name: weights[name] for name in own}, folder / file, _use_new_zipfile_serialization=zipped)
    index = {"metadata": {}, "weight_map": {name: file for file, own in names.items() for name in own}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(2, 9)).logits


def base_parameters(model) -> list[torch.nn.Parameter]:
    """The parameters of a model without those of its adapter."""
    return [weight for name, weight in model.named_parameters() if not name.startswith("deltamem.")]


def weights_of(folder) -> dict[str, Tensor]:
    """The weights of an adapter folder that has been read."""
    return {name: torch.tensor(weight) for name, weight in folder.numbers().items()}
