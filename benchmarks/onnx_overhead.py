"""What a memory costs in ONNX Runtime: the exported graph with it against the one without it, as ratios.

Command: python benchmarks/onnx_overhead.py [--layers 8 --vocabulary 1024] [--past 256,2048] [--prefill 512,2048]
    [--presets tsw,msw,ssw] [--without REWRITE …] [--repeats 15 --threads 2] [--profile] [--out FILE.md]

The shape is Qwen3-0.6B's (28 layers and 151,936 words are `--layers 28 --vocabulary 151936`) with random weights. Both
graphs come from one model, through the same exporter and fusions; the one without a memory is the model with a
DynamicCache, which deltamem has no part in. The two run in turn in one process. `--profile` shows what costs.
"""

import argparse
import collections
import dataclasses
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import torch
from scan import cpu_name
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, Qwen3Config
from transformers.exporters import OnnxExporter

from deltamem_tool import DeltaMemConfig, attach, detach
from deltamem_tool.config import PRESETS
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.optimize import REWRITES, optimize
from deltamem_tool.onnx.targets import TARGETS
from deltamem_tool.onnx.trace import CallOptions, graph_of, interface_of, traced

PLAIN = "plain"
DECODED = 16  # calls of one timed decode
SEGMENT = 32  # tokens of a message, where the memory writes by messages
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnx", "onnxscript", "onnx-ir", "transformers", "torch")


class PlainStep(nn.Module):
    """The model without a memory, called as the graph with one is."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, write_mask: Tensor, past_key_values: list[dict[str, Tensor]]
    ) -> dict[str, Any]:
        past = [(layer[contract.KEY], layer[contract.VALUE]) for layer in past_key_values]
        cache = DynamicCache(past, config=self.model.config)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        logits = self.model(
            input_ids, attention_mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits
        present = [{contract.KEY: layer.keys, contract.VALUE: layer.values} for layer in cache.layers]
        return {contract.LOGITS_OUTPUT: logits, contract.PRESENT: present}


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).eval()


class Graph:
    """An exported graph in a folder, and later its session."""

    def __init__(self, program: onnx_ir.Model, interface: Interface, folder: Path) -> None:
        self.interface = interface
        self.nodes = sum(1 for graph in program.graphs() for _ in graph)
        folder.mkdir()
        self.file = folder / contract.MODEL_FILE
        OnnxExporter.save_program(program, self.file)

    def open(self, threads: int, profile: Path | None = None) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        return onnxruntime.InferenceSession(self.file, options, providers=["CPUExecutionProvider"])

    def feed(self, session: onnxruntime.InferenceSession, past: int, tokens: int) -> dict[str, onnxruntime.OrtValue]:
        """Arguments of a call of `tokens` tokens after `past` others."""
        random = np.random.default_rng(past + tokens)
        sizes = {"batch": 1, "tokens": tokens, "past": past, "past + tokens": past + tokens}
        given = {value.name for value in session.get_inputs()}
        feed = {}
        for name, (dtype, shape) in self.interface.inputs().items():
            if name not in given:
                continue
            sized = [sizes[size] if isinstance(size, str) else size for size in shape]
            if dtype == contract.FLOAT32:
                array = random.standard_normal(sized, np.float32)
            else:
                array = np.ones(sized, dtype)
            if name == contract.SEGMENT_END:
                array = np.arange(1, tokens + 1)[None] % SEGMENT == 0
            feed[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        return feed


def export(args: argparse.Namespace, folder: Path) -> dict[str, Graph]:
    """The graphs, by preset; the plain one first."""
    torch.manual_seed(0)
    model, target = make_model(args), TARGETS["cpu"]
    graphs: dict[str, Graph] = {}
    for preset in args.presets.split(","):
        adapter = attach(model, DeltaMemConfig.preset(preset))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.02)
        interface, options = interface_of(model, adapter, "last"), CallOptions(model, "last")
        program = traced(model, adapter, interface, options, target, args.without)
        optimize(program, args.without)
        graphs[preset] = Graph(program, interface, folder / preset)
        del program
        detach(model)
    layers = tuple(dataclasses.replace(layer, state=None) for layer in interface.layers)
    plain = dataclasses.replace(interface, segment=0, layers=layers)
    graphs[PLAIN] = Graph(graph_of(PlainStep(model), plain, target), plain, folder / PLAIN)
    return graphs


def seconds(session: onnxruntime.InferenceSession, feed: dict[str, Any], calls: int) -> tuple[float, float]:
    """Of one call, and of the processor: those hardly change when other work runs on the machine."""
    start, of_processor = time.perf_counter(), time.process_time()
    for _ in range(calls):
        session.run_with_ort_values(None, feed)
    return (time.perf_counter() - start) / calls, (time.process_time() - of_processor) / calls


def compare(
    with_memory: tuple[onnxruntime.InferenceSession, dict[str, Any]],
    without: tuple[onnxruntime.InferenceSession, dict[str, Any]],
    calls: int,
    repeats: int,
) -> tuple[list[float], list[list[float]]]:
    """Median seconds of both, and for every pair of runs the ratio of their seconds, and of the processor's."""
    times: list[list[tuple[float, float]]] = [[], []]
    for repeat in range(repeats + 1):
        # Whoever comes second may gain from it: they change places.
        for which in (0, 1) if repeat % 2 else (1, 0):
            took = seconds(*(with_memory, without)[which], calls)
            if repeat:  # the first round warms up
                times[which].append(took)
    medians = [statistics.median(of_call for of_call, _ in taken) for taken in times]
    ratios = [[a / b for a, b in zip(mine, plain, strict=True)] for mine, plain in zip(*times, strict=True)]
    return medians, [list(kind) for kind in zip(*ratios, strict=True)]


def spread(ratios: list[float]) -> str:
    """The median, its quarters, and all there is."""
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"**{statistics.median(ratios):.3f}** ({low:.3f}–{high:.3f}; {min(ratios):.3f}–{max(ratios):.3f})"


def rows(args: argparse.Namespace, graphs: dict[str, Graph]) -> Iterator[str]:
    """The table's, one by one."""
    yield "| preset | run | with | without | time ratio: median (quartiles; range) | of processor time | extra nodes a layer |"
    yield "|---|---|---|---|---|---|---|"
    lengths = [("decode", int(past), 1, DECODED) for past in args.past.split(",")]
    lengths += [("prefill", 0, int(tokens), 1) for tokens in args.prefill.split(",")]
    plain = graphs.pop(PLAIN)
    plain_session = plain.open(args.threads)
    for preset, graph in graphs.items():
        session = graph.open(args.threads)
        extra = (graph.nodes - plain.nodes) / args.layers
        for run, past, tokens, calls in lengths:
            sides = [(one, of.feed(one, past, tokens)) for one, of in ((session, graph), (plain_session, plain))]
            (mine, other), (ratios, of_processor) = compare(*sides, calls, args.repeats)
            what = f"{run}, {past or tokens} tokens{' past' if past else ''}"
            yield (
                f"| {preset} | {what} | {1e3 * mine:.2f} ms | {1e3 * other:.2f} ms "
                f"| {spread(ratios)} | {spread(of_processor)} | {extra:.1f} ({graph.nodes} − {plain.nodes}) |"
            )
        del session, sides
        gc.collect()
    if args.profile:
        for name, graph in (graphs | {PLAIN: plain}).items():
            for run, past, tokens, calls in lengths:
                yield from show_profile(f"{name}, {run} {past or tokens}", graph, past, tokens, calls, args)


def show_profile(
    title: str, graph: Graph, past: int, tokens: int, calls: int, args: argparse.Namespace
) -> Iterator[str]:
    """Where the time of a call goes: microseconds and number of nodes, by operator."""
    with tempfile.TemporaryDirectory() as folder:
        session = graph.open(args.threads, Path(folder) / "profile")
        feed = graph.feed(session, past, tokens)
        for _ in range(calls):
            session.run_with_ort_values(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]].append(event["dur"])
    yield f"\n{title}: {sum(map(sum, spent.values())) / calls:.0f} µs in kernels of a call\n"
    for name, taken in sorted(spent.items(), key=lambda item: -sum(item[1])):
        yield f"    {sum(taken) / calls:9.1f} µs  {len(taken) // calls:4d} × {name}"


def heading(args: argparse.Namespace) -> Iterator[str]:
    cores = f" on {len(os.sched_getaffinity(0))} core(s)" if hasattr(os, "sched_getaffinity") else ""
    yield f"{date.today()}, {cpu_name()}, {args.threads} thread(s){cores}, Python {platform.python_version()}"
    for package in PACKAGES:
        try:
            yield f", {package} {version(package)}"
        except ModuleNotFoundError:  # one of the two distributions of ONNX Runtime
            continue
    yield f"; {args.layers} layers, {args.vocabulary} words; {args.repeats} pairs of runs; rewrites: "
    yield ", ".join(name for name in REWRITES if name not in args.without) or "none"
    yield ".\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"layers": 8, "vocabulary": 1024, "repeats": 15, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--presets", default="tsw", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--past", default="256,2048", help="past tokens of a decode")
    parser.add_argument("--prefill", default="512,2048", help="tokens of a prefill")
    parser.add_argument("--without", action="append", default=[], choices=REWRITES, help="leave a rewrite out")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    parser.add_argument("--keep", type=Path, help="leave the graphs in this folder")
    args = parser.parse_args()

    lines = ["".join(heading(args))]
    print(lines[0])
    with tempfile.TemporaryDirectory() as folder:
        if args.keep:
            args.keep.mkdir()
        graphs = export(args, args.keep or Path(folder))
        gc.collect()
        for row in rows(args, graphs):
            print(row, flush=True)
            lines.append(row)
    if args.out:
        with args.out.open("a") as file:
            file.write("\n".join(lines) + "\n\n")


if __name__ == "__main__":
    main()
