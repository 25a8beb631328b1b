"""What exporting and loading a large model takes: peak memory beside the size of its weights, and loading times.

    python benchmarks/onnx_large.py [--layers 16 --hidden 2048 --vocabulary 32000] [--dtype float32] [--quantize none]
        [--folder DIR] [--out FILE]

Makes a random checkpoint of Qwen3's architecture (by default 3.5 GB in float32), gives it a memory with `deltamem
patch`, exports it with `deltamem export`, and loads the folder twice: weights mapped from the file, and packed by ONNX
Runtime into its own memory. Every step is a process of its own, whose resident memory is watched: "own" is what only it
can hold, "mapped" are pages of files, which the system can take back. Needs three times the checkpoint's size on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "transformers", "onnxruntime-gpu", "onnxscript")
GIB = 2**30
WATCH_SECONDS = 0.05  # between two looks at a process

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


def watched(command: list[str]) -> dict:
    """Run it; its output, its time, and the largest resident memory of its own and of mapped files, in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = {"resident": 0, "own": 0, "mapped": 0}
    while process.poll() is None:
        now = resident(process.pid)
        peak = {name: max(peak[name], now[name]) for name in peak}
        time.sleep(WATCH_SECONDS)
    if process.returncode:
        sys.exit(f"{' '.join(command[:3])} failed.")
    assert process.stdout is not None
    return {"output": process.stdout.read(), "seconds": time.perf_counter() - start, **peak}


def resident(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        lines = []
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    own, mapped = (int(kilobytes.get(name, 0)) * 1024 for name in ("RssAnon", "RssFile"))
    return {"resident": own + mapped, "own": own, "mapped": mapped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    for name, default in {"layers": 16, "hidden": 2_048, "vocabulary": 32_000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", help="of the checkpoint and of the export")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        table = measure(Path(name), args)
    print(table)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(table)


def measure(folder: Path, args: argparse.Namespace) -> str:
    base, adapter, onnx = (str(folder / name) for name in ("base", "adapter", "onnx"))
    command = [sys.executable, "-m", "deltamem_tool"]
    shape = [str(size) for size in (args.layers, args.hidden, args.vocabulary)]
    watched([sys.executable, "-c", MAKE, base, *shape, args.dtype])
    weights = (folder / "base" / "model.safetensors").stat().st_size
    watched([*command, "patch", base, "--out", adapter, "--delta-init", "random"])
    options = ["--dtype", args.dtype, "--quantize", args.quantize]
    exported = watched([*command, "export", adapter, "--out", onnx, *options, "--json"])
    manifest = json.loads(exported["output"])
    data = sum(file.stat().st_size for file in (folder / "onnx").iterdir() if file.suffix in (".onnx", ".data"))
    lines = [
        f"{date.today()}, {len(os.sched_getaffinity(0))} core(s), Python {sys.version.split()[0]}, "
        + ", ".join(f"{package} {version(package)}" for package in PACKAGES),
        "",
        f"{args.layers} layers of width {args.hidden}, {args.vocabulary} words, {args.dtype}, quantisation "
        f"{args.quantize}: {weights / 1e9:.2f} GB of weights, {data / 1e9:.2f} GB of graph and data; ONNX Runtime and "
        f"PyTorch differ by at most {manifest['max_abs_diff']:.1e}.",
        "",
        "| step | seconds | resident, of the weights | own | mapped files |",
        "|---|---|---|---|---|",
        row("export", exported, weights, f"{exported['seconds']:.0f}"),
    ]
    for how in ("mapped", "packed"):
        loaded = watched([sys.executable, "-c", LOAD, onnx, how])
        took = json.loads(loaded["output"].splitlines()[-1])
        lines.append(row(f"load, {how}", loaded, weights, f"{took['load']:.2f}, first token {took['first']:.2f}"))
    return "\n".join(lines) + "\n\n"


def row(name: str, peak: dict, weights: int, seconds: str) -> str:
    sizes = (f"{peak[kind] / GIB:.2f} GiB ({peak[kind] / weights:.2f}×)" for kind in ("resident", "own", "mapped"))
    return f"| {name} | {seconds} | " + " | ".join(sizes) + " |"


if __name__ == "__main__":
    main()
