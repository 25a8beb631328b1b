"""Tiny models as GGUF files, written with llama.cpp's own package as its converter writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map, quantize
from helpers.tiny import CHAT_TEMPLATE, END, PAD, SPECIAL, tiny_model
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

BLOCK = 32  # number of columns that are quantised together
MERGES = ("h e", "t he", "Ġ t", "Ġt he", "m y", "Ġ my", "i s", "Ġ is")


def vocabulary() -> list[str]:
    """A byte-level vocabulary: special tokens, an alphabet, and the merged tokens."""
    return [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]


def tiny_gguf(
    file: Path,
    name: str = "llama",
    seed: int = 0,
    kind: str = "F32",
    template: str | None = CHAT_TEMPLATE,
    leave_out: tuple[str, ...] = (),
    **changes,
) -> PreTrainedModel:
    """Write a model with random weights and a tokenizer as `file`, and return the model as it was before.

    Args:
        file: the file to write.
        name: of `helpers.tiny`, or gpt2.
        seed: of the weights.
        kind: how matrices are stored, such as Q8_0; vectors and small convolutions are float32.
        template: the chat template, if any.
        leave_out: weights that are not written, by their names in the file.
        changes: of the model's config.
    """
    changes = {"vocab_size": len(vocabulary()), **changes}
    if name == "gpt2":
        torch.manual_seed(seed)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024, "initializer_range": 0.2}
        model = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=END, **changes)).eval()
    else:
        model = tiny_model(name, seed, **{"intermediate_size": 64, **changes})
    write_gguf(model, file, name, kind, template, leave_out)
    return model


def write_gguf(model, file: Path, architecture: str, kind: str, template: str | None, leave_out=()) -> None:
    config, writer = model.config, GGUFWriter(file, architecture)
    writer.add_name("A tiny model")
    _add_sizes(writer, config)
    _add_tokenizer(writer, template)
    for name, weight in _tensors(model, architecture).items():
        if name in leave_out:
            continue
        if weight.ndim == 2 and weight.shape[1] % BLOCK == 0 and kind != "F32":
            writer.add_tensor(name, quantize(weight, GGMLQuantizationType[kind]), raw_dtype=GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    if config.model_type == "lfm2":
        attends = [kind == "full_attention" for kind in config.layer_types]
        writer.add_head_count_kv([config.num_key_value_heads * here for here in attends])
        writer.add_shortconv_l_cache(config.conv_L_cache)
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)


def _add_tokenizer(writer: GGUFWriter, template: str | None) -> None:
    tokens = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(END)
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)


def _tensors(model: PreTrainedModel, architecture: str) -> dict[str, NDArray[np.float32]]:
    """The weights by their names in the file, arranged as llama.cpp has them."""
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    tensors = {}
    for name, weight in model.state_dict().items():
        module, _, suffix = name.rpartition(".")
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        numbers = weight.float().numpy()
        if architecture == "llama":
            heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
            numbers = _permuted(numbers, heads.get(module.rpartition(".")[2]))
        elif architecture == "gpt2" and numbers.ndim == 2 and module.rpartition(".")[2].startswith("c_"):
            numbers = numbers.T
        elif module.endswith("conv.conv"):
            numbers = numbers.squeeze(1)
        tensors[f"{names.get_name(module)}.{suffix}"] = np.ascontiguousarray(numbers)
    return tensors


def _permuted(weight: NDArray[np.float32], heads: int | None) -> NDArray[np.float32]:
    """The rows of a head, reordered for rotary positions of neighbouring rows instead of halves."""
    if heads is None:
        return weight
    size = weight.shape[0] // heads
    halves = [np.arange(size).reshape(2, -1).T.reshape(-1) + head * size for head in range(heads)]
    return weight[np.concatenate(halves)]
