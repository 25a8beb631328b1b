"""Measure half precision and quantisation in ONNX Runtime: size, speed, agreement, state-only recall.

Command: python benchmarks/onnx_quantized.py [--episodes 200 --repeats 15 --layers 2 --checkpoint DIR --folder DIR]

Agreement and recall are measured on the quickstart's model with the shipped adapter. Such a small model says little
about speed, which is therefore also measured with Qwen3-0.6B's layer shape (random weights, few layers, a small
vocabulary). All types run in turn; ratios are relative to float32 in the same round. Bits, groups and zero points are
compared on a checkpoint, with a memory that adds nothing, over English text. With `--folder`, exported graphs are kept
for later runs.
"""

import argparse
import shutil
import statistics
import sysconfig
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import smollm2
import torch
from common import PACKAGES, qwen3, randomize, versions
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool.adapter.load import load
from deltamem_tool.base_model.tokenizer import tokenizer_of
from deltamem_tool.bench.timing import cpu_name, interleave
from deltamem_tool.evaluation import MEMORY_ONLY
from deltamem_tool.evaluation.conditions import STATE, EvalProtocol
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.tasks.recall import Recall
from deltamem_tool.io.names import BACKBONE
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.export.compare import (
    greedy_agreement,
    half_precision_errors,
    largest_difference,
    run_in_onnx_runtime,
)
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.export.fused_memory import fused_memories
from deltamem_tool.onnx.export.quantize import memory_weights, quantize_graph
from deltamem_tool.onnx.export.rewrites import JOIN_WEIGHTS
from deltamem_tool.onnx.export.targets import GROUP_SIZE, INT4, INT8, TARGETS, quantization_of
from deltamem_tool.onnx.runtime.engine import OnnxModel
from deltamem_tool.onnx.runtime.graph import Graph
from deltamem_tool.quickstart.bases import BASES

PREFILL, PAST, DECODED = 512, 256, 32  # tokens
FACTS, SHIPPED_ADAPTER = BASES[BACKBONE].facts, BASES[BACKBONE].adapter
CHECKPOINT_GROUPS = (16, 32, 64)
ROOT = Path(__file__).resolve().parents[1]
TEXTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("deploy", "docker", "evaluation", "hub", "install")),
    Path(sysconfig.get_path("stdlib"), "LICENSE.txt"),
)
CHARACTERS, WINDOW = 1000, 480  # characters between the starts of two texts, and tokens per text
KINDS = ("float32", "float16", INT8, INT4)


def quantized_copy(
    folder: Path, how: str, model: PreTrainedModel, group_size: int = GROUP_SIZE, symmetric: bool | None = None
) -> Path:
    """Write a quantised copy of a float32 folder beside it."""
    copy = folder.with_name(f"{folder.name}-{how}")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    adapter = adapter_of(model)
    weights = memory_weights(adapter, fused_memories(adapter, TARGETS["cpu"], JOIN_WEIGHTS))
    quantize_graph(copy, quantization_of(how, group_size, symmetric), weights)
    return copy


def megabytes(folder: Path) -> float:
    return sum((folder / name).stat().st_size for name in (contract.MODEL_FILE, contract.DATA_FILE)) / 1e6


def recall(model: OnnxModel, tokenizer: PreTrainedTokenizerBase, episodes: int) -> list[str]:
    """Return the recall from the state alone, as mean and 95 % interval by number of facts."""
    cells = []
    for facts in FACTS:
        protocol = EvalProtocol.parse(MEMORY_ONLY)
        score = evaluate(model, tokenizer, Recall((facts,), episodes), protocol, only=(STATE,)).estimate("exact", STATE)
        cells.append(f"{score.mean:.3f} ({score.low:.2f}–{score.high:.2f})")
    return cells


def prefill(graph: Graph) -> float:
    """Return the seconds of one call with `PREFILL` tokens."""
    return _timed_call(graph, PREFILL, graph.empty_past(1), 0)[0]


def decode(graph: Graph) -> float:
    """Return the seconds per token after `PAST` tokens, as the mean over a few."""
    _, past = _timed_call(graph, PAST, graph.empty_past(1), 0)
    seconds = 0.0
    for i in range(DECODED):
        took, past = _timed_call(graph, 1, past, PAST + i)
        seconds += took
    return seconds / DECODED


def _timed_call(graph: Graph, tokens: int, past: dict, fed: int) -> tuple[float, dict]:
    ids = np.random.default_rng(fed).integers(0, graph.interface.vocab_size, (1, tokens))
    mask, write = np.ones((1, fed + tokens), np.int64), np.ones((1, tokens), bool)
    start = time.perf_counter()
    _, past = graph.step(ids, mask, write, past)
    return time.perf_counter() - start, past


def ratios(run, graphs: dict[str, Graph], repeats: int) -> dict[str, str]:
    """Return the time relative to float32 by kind: median and range over rounds in which all kinds run in turn."""
    seconds = interleave({kind: partial(run, graph) for kind, graph in graphs.items()}, repeats).values
    cells = {"float32": "1"}
    for kind in graphs.keys() - cells:
        over = [a / b for a, b in zip(seconds[kind], seconds["float32"], strict=True)]
        cells[kind] = f"{statistics.median(over):.2f} ({min(over):.2f}–{max(over):.2f})"
    return cells


def text_table(scratch: Path, checkpoint: Path) -> None:
    """Compare each kind of quantisation with float32, over texts that come with Python and with this project."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    attach(model, DeltaMemConfig(layers=(0,)))  # a fresh memory corrects nothing
    folder = scratch / checkpoint.name
    if not folder.exists():
        export_onnx(model, tokenizer, folder, logits="all", without=JOIN_WEIGHTS)
    texts = [path.read_text(encoding="utf-8")[CHARACTERS:] for path in TEXTS]
    windows = [tokenizer(text, return_tensors="np").input_ids[:, :WINDOW] for text in texts]
    truth = [log_probabilities(OnnxModel(folder).graph, ids) for ids in windows]
    print("| | MB | seconds to quantise | perplexity | KL divergence | same most likely token |")
    print("|---|---|---|---|---|---|")
    losses = [loss(x, ids) for x, ids in zip(truth, windows, strict=True)]
    print(f"| float32 | {megabytes(folder):.1f} | | {np.exp(np.mean(losses)):.2f} | 0 | 1 |", flush=True)
    for how, group_size, symmetric in product((INT8, INT4), CHECKPOINT_GROUPS, (True, False)):
        start = time.process_time()
        copy = quantized_copy(folder, how, model, group_size, symmetric)
        seconds = time.process_time() - start
        graph, figures = OnnxModel(copy).graph, []
        for x, ids in zip(truth, windows, strict=True):
            y = log_probabilities(graph, ids)
            divergence = (np.exp(x) * (x - y)).sum(-1).mean()
            figures.append((loss(y, ids), divergence, (x.argmax(-1) == y.argmax(-1)).mean()))
        mean, divergence, same = np.mean(figures, axis=0)
        name = f"{how}, groups of {group_size}{'' if symmetric else ', asymmetric'}"
        cells = [f"{megabytes(copy):.1f}", f"{seconds:.1f}", f"{np.exp(mean):.2f}", f"{divergence:.4f}", f"{same:.3f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        shutil.rmtree(copy)


def loss(found: np.ndarray, ids: np.ndarray) -> float:
    """Return the mean negative log-likelihood of a text's tokens after the first."""
    return -found[np.arange(ids.shape[1] - 1), ids[0, 1:]].mean()


def log_probabilities(graph: Graph, ids: np.ndarray) -> np.ndarray:
    """Return the log-probabilities `[T, V]` of one text."""
    logits, _ = graph.step(ids, np.ones_like(ids), np.ones(ids.shape, bool), graph.empty_past(1))
    shifted = logits[0] - logits[0].max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def wide_graphs(folder: Path, layers: int) -> dict[str, Graph]:
    """Return graphs with Qwen3-0.6B's layer shape and a memory, by kind."""
    graphs = {}
    for kind in ("float32", "float16"):
        torch.manual_seed(0)
        model = qwen3(layers, 1024, tied=False).to(getattr(torch, kind))
        randomize(attach(model, DeltaMemConfig()), "delta", "gate")
        if not (folder / kind).exists():
            export_onnx(model, tokenizer_of(load(SHIPPED_ADAPTER)), folder / kind, without=JOIN_WEIGHTS)
        graphs[kind] = OnnxModel(folder / kind).graph
        if kind == "float32":
            for how in (INT8, INT4):
                graphs[how] = OnnxModel(quantized_copy(folder / kind, how, model)).graph
    return {kind: graphs[kind] for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"episodes": 200, "repeats": 15, "layers": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    print(f"{cpu_name()}, {versions(*PACKAGES)}")
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as scratch:
        quickstart_tables(Path(scratch), args)
        print(f"\nTime over float32, Qwen3-0.6B's layer shape, {args.layers} layers, median (range)\n")
        speed_table(wide_graphs(Path(scratch) / f"wide-{args.layers}", args.layers), args.repeats)
        checkpoint = args.checkpoint or smollm2.fetch()
        print(f"\n{checkpoint.name} over {len(TEXTS)} texts of at most {WINDOW} tokens\n")
        text_table(Path(scratch), checkpoint)


def quickstart_tables(scratch: Path, args: argparse.Namespace) -> None:
    folders, models = {}, {}
    for kind in ("float32", "float16"):
        models[kind] = load(SHIPPED_ADAPTER, dtype=getattr(torch, kind))
        tokenizer = tokenizer_of(models[kind])
        folders[kind] = scratch / kind
        if not folders[kind].exists():
            export_onnx(models[kind], tokenizer, folders[kind], without=JOIN_WEIGHTS)
    for how in (INT8, INT4):
        models[how] = models["float32"]
        folders[how] = quantized_copy(folders["float32"], how, models[how])
    graphs = {}
    print(f"\nQuickstart model, {args.episodes} conversations per number of facts; recall from the state, by facts\n")
    print("| | MB | largest difference | greedy tokens | " + " | ".join(map(str, FACTS)) + " |")
    print("|---|" + "---|" * (3 + len(FACTS)))
    for kind in KINDS:
        runtime, model = OnnxModel(folders[kind]), models[kind]
        graphs[kind], options = runtime.graph, CallOptions(model, "last")
        if kind == "float16":
            difference = half_precision_errors(model, run_in_onnx_runtime(model, runtime.graph), options)[0]
        else:
            difference = largest_difference(model, runtime.graph, options)
        same = greedy_agreement(model, runtime.graph, options)
        cells = [f"{megabytes(folders[kind]):.2f}", f"{difference:.1e}", f"{same:.3f}"]
        print(f"| {kind} | " + " | ".join(cells + recall(runtime, tokenizer, args.episodes)) + " |", flush=True)
    print("\nTime over float32, quickstart model, median (range)\n")
    speed_table(graphs, args.repeats)


def speed_table(graphs: dict[str, Graph], repeats: int) -> None:
    prefills, decodes = ratios(prefill, graphs, repeats), ratios(decode, graphs, repeats)
    print(f"| | prefill, {PREFILL} tokens | decode after {PAST} |\n|---|---|---|")
    for kind in graphs:
        print(f"| {kind} | {prefills[kind]} | {decodes[kind]} |", flush=True)


if __name__ == "__main__":
    main()
