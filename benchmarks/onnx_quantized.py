"""What half precision and quantisation cost and give in ONNX Runtime: size, speed, agreement, state-only recall.

Command: python benchmarks/onnx_quantized.py [--episodes 200 --repeats 15 --layers 2 --folder DIR]

Size, agreement and recall are of the quickstart's model with the adapter that ships. So small a model says little
about speed: that is measured on Qwen3-0.6B's layer shape too (random weights, few layers, a small vocabulary). All
types run in turn; the ratios are to float32 in the same round. In `--folder` what was exported stays, for another run.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import PACKAGES, qwen3, randomize, versions
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool._compat import OnnxExporter
from deltamem_tool.adapter.load import load
from deltamem_tool.base_model.tokenizer import tokenizer_of
from deltamem_tool.bench.timing import cpu_name, in_turn
from deltamem_tool.evaluation import MEMORY_ONLY
from deltamem_tool.evaluation.conditions import STATE, EvalProtocol
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.tasks.recall import Recall
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.export.compare import (
    greedy_agreement,
    half_precision_errors,
    in_onnx_runtime,
    largest_difference,
)
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.export.fused_memory import fused_memories
from deltamem_tool.onnx.export.quantize import memory_weights, quantize_graph
from deltamem_tool.onnx.export.rewrites import JOIN_WEIGHTS, optimize
from deltamem_tool.onnx.export.targets import GROUP_SIZE, INT4, INT8, SYMMETRIC, TARGETS, quantization_of
from deltamem_tool.onnx.export.trace import interface_of, traced
from deltamem_tool.onnx.runtime.engine import OnnxModel
from deltamem_tool.onnx.runtime.graph import Graph
from deltamem_tool.quickstart import FACTS, SHIPPED_ADAPTER

PREFILL, PAST, DECODED = 512, 256, 32  # tokens
KINDS = ("float32", "float16", INT8, INT4)


def quantized_copy(folder: Path, how: str, model: PreTrainedModel) -> Path:
    """A copy of a float32 folder beside it, quantised."""
    copy = folder.with_name(f"{folder.name}-{how}")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    adapter = adapter_of(model)
    weights = memory_weights(adapter, fused_memories(adapter, TARGETS["cpu"], JOIN_WEIGHTS))
    quantize_graph(copy, quantization_of(how, GROUP_SIZE, SYMMETRIC), weights)
    return copy


def megabytes(folder: Path) -> float:
    return sum((folder / name).stat().st_size for name in (contract.MODEL_FILE, contract.DATA_FILE)) / 1e6


def recall(model: OnnxModel, tokenizer: PreTrainedTokenizerBase, episodes: int) -> list[str]:
    """State only, mean and 95 % interval by number of facts."""
    cells = []
    for facts in FACTS:
        protocol = EvalProtocol.parse(MEMORY_ONLY)
        score = evaluate(model, tokenizer, Recall((facts,), episodes), protocol, only=(STATE,)).estimate("exact", STATE)
        cells.append(f"{score.mean:.3f} ({score.low:.2f}–{score.high:.2f})")
    return cells


def prefill(graph: Graph) -> float:
    """Seconds of one call over `PREFILL` tokens."""
    return _timed_call(graph, PREFILL, graph.empty_past(1), 0)[0]


def decode(graph: Graph) -> float:
    """Seconds of a token after `PAST` of them, mean over a few."""
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
    """Time over that of float32, by kind: median and range over rounds in which all kinds run in turn."""
    seconds = in_turn({kind: partial(run, graph) for kind, graph in graphs.items()}, repeats).values
    cells = {"float32": "1"}
    for kind in graphs.keys() - cells:
        over = [a / b for a, b in zip(seconds[kind], seconds["float32"], strict=True)]
        cells[kind] = f"{statistics.median(over):.2f} ({min(over):.2f}–{max(over):.2f})"
    return cells


def wide_graphs(folder: Path, layers: int) -> dict[str, Graph]:
    """Qwen3-0.6B's layer shape with a memory, by kind."""
    graphs = {}
    for kind in ("float32", "float16"):
        torch.manual_seed(0)
        model = qwen3(layers, 1024, tied=False).to(getattr(torch, kind))
        adapter = attach(model, DeltaMemConfig())
        randomize(adapter, "delta", "gate")
        interface, options = interface_of(model, adapter, "last", TARGETS["cpu"]), CallOptions(model, "last")
        at = folder / kind
        if not at.exists():
            program = traced(model, adapter, interface, options, TARGETS["cpu"], JOIN_WEIGHTS)
            optimize(program, JOIN_WEIGHTS)
            at.mkdir(parents=True)
            OnnxExporter.save_program(program, at / contract.MODEL_FILE)
        graphs[kind] = Graph(at, interface)
        if kind == "float32":
            for how in (INT8, INT4):
                graphs[how] = Graph(quantized_copy(at, how, model), interface)
    return {kind: graphs[kind] for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"episodes": 200, "repeats": 15, "layers": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    print(f"{cpu_name()}, {versions(*PACKAGES)}")
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as scratch:
        quickstart_tables(Path(scratch), args)
        print(f"\nTime over float32, Qwen3-0.6B's layer shape, {args.layers} layers, median (range)\n")
        speed_table(wide_graphs(Path(scratch) / f"wide-{args.layers}", args.layers), args.repeats)


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
    print(
        f"\nQuickstart model, {args.episodes} conversations a number of facts; recall from the state alone, by facts\n"
    )
    print("| | MB | largest difference | greedy tokens | " + " | ".join(map(str, FACTS)) + " |")
    print("|---|" + "---|" * (3 + len(FACTS)))
    for kind in KINDS:
        runtime, model = OnnxModel(folders[kind]), models[kind]
        graphs[kind], options = runtime.graph, CallOptions(model, "last")
        if kind == "float16":
            difference = half_precision_errors(model, in_onnx_runtime(model, runtime.graph), options)[0]
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
