"""Measure export and loading of a large model: peak memory relative to its weights, and loading times.

    python benchmarks/onnx_large.py [--layers 16 --hidden 2048 --vocabulary 32000] [--dtype float32] [--quantize none]
        [--folder DIR] [--out FILE]

This creates a random checkpoint of Qwen3's architecture (by default 3.5 GB in float32), attaches a memory with
`deltamem patch`, exports it with `deltamem export`, and loads the folder twice: with weights mapped from the file, and
with weights packed by ONNX Runtime into its own memory. Every step is a separate process whose resident memory is
polled: "own" is memory of the process alone, "mapped" are pages of files, which the system can reclaim. It needs three
times the checkpoint's size on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from datetime import date
from pathlib import Path

from common import PACKAGES, Command, versions, watched

GIB = 2**30

MAKE = """
import sys, torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
torch.manual_seed(0)
layers, hidden, words = map(int, sys.argv[2:5])
torch.set_default_dtype(getattr(torch, sys.argv[5]))
config = Qwen3Config(vocab_size=words, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
Qwen3ForCausalLM(config).save_pretrained(sys.argv[1])
words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(sys.argv[1])
"""

LOAD = """
import json, sys, time
import numpy as np
from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.onnx.runtime.engine import OnnxModel
from deltamem_tool.chat.sampling import Sampling
start = time.perf_counter()
model = OnnxModel(sys.argv[1], map_weights=sys.argv[2] == "mapped")
loaded = time.perf_counter()
Conversation(model).generate("a b", Sampling(max_new_tokens=1))
print(json.dumps({"load": loaded - start, "first": time.perf_counter() - loaded}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    for name, default in {"layers": 16, "hidden": 2_048, "vocabulary": 32_000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", help="data type of the checkpoint and of the export")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--folder", type=Path, help="working folder; a temporary one by default")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        table = measure(Path(name), args)
    print(table)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(table)


def measure(folder: Path, args: argparse.Namespace) -> str:
    base, adapter, onnx = (folder / name for name in ("base", "adapter", "onnx"))
    deltamem = ("-m", "deltamem_tool")
    watched("-c", MAKE, base, args.layers, args.hidden, args.vocabulary, args.dtype)
    weights = (base / "model.safetensors").stat().st_size
    watched(*deltamem, "patch", base, "--out", adapter, "--delta-init", "random")
    options = ["--dtype", args.dtype, "--quantize", args.quantize]
    exported = watched(*deltamem, "export", adapter, "--out", onnx, *options, "--json")
    manifest = json.loads(exported.output)
    data = sum(file.stat().st_size for file in onnx.iterdir() if file.suffix in (".onnx", ".data"))
    lines = [
        f"{date.today()}, {len(os.sched_getaffinity(0))} core(s), Python {platform.python_version()}, "
        f"{versions(*PACKAGES)}",
        "",
        f"{args.layers} layers of width {args.hidden}, {args.vocabulary} words, {args.dtype}, quantisation "
        f"{args.quantize}: {weights / 1e9:.2f} GB of weights, {data / 1e9:.2f} GB of graph and data; ONNX Runtime and "
        f"PyTorch differ by at most {manifest['max_abs_diff']:.1e}.",
        "",
        "| step | seconds | resident, of the weights | own | mapped files |",
        "|---|---|---|---|---|",
        row("export", exported, weights, f"{exported.seconds:.0f}, {exported.of_processor:.0f} of CPU time"),
    ]
    for how in ("mapped", "packed") if args.quantize == "none" else ("packed",):
        loaded = watched("-c", LOAD, onnx, how)
        took = json.loads(loaded.output.splitlines()[-1])
        lines.append(row(f"load, {how}", loaded, weights, f"{took['load']:.2f}, first token {took['first']:.2f}"))
    return "\n".join(lines) + "\n\n"


def row(name: str, command: Command, weights: int, seconds: str) -> str:
    sizes = (
        f"{size / GIB:.2f} GiB ({size / weights:.2f}×)" for size in (command.resident, command.own, command.mapped)
    )
    return f"| {name} | {seconds} | " + " | ".join(sizes) + " |"


if __name__ == "__main__":
    main()
