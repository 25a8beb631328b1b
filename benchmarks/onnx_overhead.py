"""What a memory costs in ONNX Runtime: the exported graph with it against the one without it, as ratios.

Command: python benchmarks/onnx_overhead.py [--layers 8 --vocabulary 1024] [--past 256,2048] [--prefill 512,2048]
    [--presets tsw,msw,ssw] [--without REWRITE …] [--repeats 15 --threads 2] [--profile] [--out FILE.md]

The shape is Qwen3-0.6B's (28 layers and 151,936 words are `--layers 28 --vocabulary 151936`) with random weights. Both
graphs come from one model, through the same exporter and fusions; the one without a memory is the model alone: "plain"
as the exporter writes it, "tidied" by those rewrites of `onnx/export/rewrites.py` that are not about the memory. Two
graphs run in turn in one process. `--profile` shows what costs.
"""

import argparse
import collections
import gc
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from common import PACKAGES, compare, qwen3, randomize, spread, timed, versions

from deltamem_tool import DeltaMemConfig, attach, detach
from deltamem_tool._compat import OnnxExporter
from deltamem_tool.bench.timing import cpu_name
from deltamem_tool.config import PRESETS
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.export.base_graph import PlainStep, without_memory
from deltamem_tool.onnx.export.rewrites import REWRITES, optimize
from deltamem_tool.onnx.export.targets import TARGETS
from deltamem_tool.onnx.export.trace import CallOptions, graph_of, interface_of, traced

PLAIN = "plain"  # as transformers exports it
TIDIED = "tidied"  # the same with the rewrites that are not about the memory
DECODED = 8  # calls of one timed decode
SEGMENT = 32  # tokens of a message, where the memory writes by messages


def export(args: argparse.Namespace, folder: Path) -> None:
    """One graph a preset, and the plain one as the exporter has it and tidied as those with a memory are."""
    torch.manual_seed(0)
    model, target = qwen3(args.layers, args.vocabulary), TARGETS["cpu"]
    for preset in args.presets.split(","):
        adapter = attach(model, DeltaMemConfig.preset(preset))
        randomize(adapter)
        interface, options = interface_of(model, adapter, "last", target), CallOptions(model, "last")
        program = traced(model, adapter, interface, options, target, args.without)
        optimize(program, args.without)
        save(program, folder / preset)
        detach(model)
    program = graph_of(PlainStep(model, options), without_memory(interface), target)
    save(program, folder / PLAIN)
    optimize(program, args.without)
    save(program, folder / TIDIED)


def save(program: onnx_ir.Model, folder: Path) -> None:
    folder.mkdir()
    OnnxExporter.save_program(program, folder / contract.MODEL_FILE)


def nodes(folder: Path) -> int:
    return len(onnx.load(folder / contract.MODEL_FILE, load_external_data=False).graph.node)


def session_of(folder: Path, args: argparse.Namespace, profile: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    if args.no_spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(folder / contract.MODEL_FILE, options, providers=["CPUExecutionProvider"])


def feed(session: onnxruntime.InferenceSession, past: int, tokens: int) -> dict[str, onnxruntime.OrtValue]:
    """Arguments of a call of `tokens` tokens after `past` others."""
    random = np.random.default_rng(past + tokens)
    sizes = {contract.BATCH: 1, contract.TOKENS: tokens, contract.PAST_TOKENS: past, contract.ALL_TOKENS: past + tokens}
    given = {}
    for value in session.get_inputs():
        shape = [sizes.get(size, size) for size in value.shape]
        if value.type == "tensor(float)":
            array = random.standard_normal(shape, np.float32)
        else:
            array = np.ones(shape, np.bool_ if value.type == "tensor(bool)" else np.int64)
        if value.name == contract.SEGMENT_END:
            array = np.arange(1, tokens + 1)[None] % SEGMENT == 0
        given[value.name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return given


def lengths(args: argparse.Namespace) -> Iterator[tuple[str, int, int, int]]:
    """What is timed: its name, past tokens, tokens, and calls of one timing."""
    for past in filter(None, args.past.split(",")):
        yield f"decode, {past} past", int(past), 1, DECODED
    for tokens in filter(None, args.prefill.split(",")):
        yield f"prefill, {tokens}", 0, int(tokens), 1


def rows(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The table's, one by one."""
    yield "| preset | against | tokens | with | without | time ratio (quartiles; range) | of processor time | nodes |"
    yield "|---|---|---|---|---|---|---|---|"
    for against in args.against.split(","):
        other = session_of(folder / against, args)
        for preset in args.presets.split(","):
            session = session_of(folder / preset, args)
            more = nodes(folder / preset) - nodes(folder / against)
            for what, past, tokens, calls in lengths(args):
                runs = [partial(each.run_with_ort_values, None, feed(each, past, tokens)) for each in (session, other)]
                seconds = [partial(timed, run, calls) for run in runs]
                (mine, others), (ratios, of_processor) = compare(*seconds, args.repeats)
                yield (
                    f"| {preset} | {against} | {what} | {1e3 * mine:.2f} ms | {1e3 * others:.2f} ms "
                    f"| {spread(ratios)} | {spread(of_processor)} | {more:+d}, {more / args.layers:+.1f} a layer |"
                )
            del session, runs, seconds
            gc.collect()
        del other
    if args.profile:
        for name in (*args.presets.split(","), *args.against.split(",")):
            for what, past, tokens, calls in lengths(args):
                yield from show_profile(name, what, past, tokens, calls, args, folder)


def show_profile(
    name: str, what: str, past: int, tokens: int, calls: int, args: argparse.Namespace, folder: Path
) -> Iterator[str]:
    """Where the time of a call goes, by operator: the shortest that each node took, added up."""
    with tempfile.TemporaryDirectory() as profiles:
        session = session_of(folder / name, args, Path(profiles) / "profile")
        given = feed(session, past, tokens)
        for _ in range(calls + 1):
            session.run_with_ort_values(None, given)
        events = json.loads(Path(session.end_profiling()).read_text())
    took: dict[str, dict[str, int]] = collections.defaultdict(dict)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            of_operator, node = took[event["args"]["op_name"]], event["name"]
            of_operator[node] = min(event["dur"], of_operator.get(node, event["dur"]))
    total = sum(sum(taken.values()) for taken in took.values())
    yield f"\n{name}, {what}: {total} µs\n"
    for operator, taken in sorted(took.items(), key=lambda item: -sum(item[1].values())):
        yield f"    {sum(taken.values()):9d} µs  {len(taken):4d} × {operator}"


def heading(args: argparse.Namespace) -> Iterator[str]:
    cores = f" on {len(os.sched_getaffinity(0))} core(s)" if hasattr(os, "sched_getaffinity") else ""
    yield f"{date.today()}, {cpu_name()}, {args.threads} thread(s){cores}, Python {platform.python_version()}, "
    yield versions(*PACKAGES)
    yield f"; {args.layers} layers, {args.vocabulary} words; {args.repeats} pairs of runs"
    yield f"{', threads wait asleep' if args.no_spinning else ''}; rewrites: "
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
    parser.add_argument(
        "--against", default=f"{PLAIN},{TIDIED}", help="what the graphs with a memory are compared with"
    )
    parser.add_argument("--no-spinning", action="store_true", help="threads wait asleep: for a machine with other work")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    parser.add_argument("--graphs", type=Path, help="leave the graphs in this folder, or take them from there")
    args = parser.parse_args()

    lines = ["".join(heading(args))]
    print(lines[0])
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.graphs or Path(temporary)
        if not (folder / TIDIED).exists():
            folder.mkdir(exist_ok=True)
            export(args, folder)
            gc.collect()
        for row in rows(args, folder):
            print(row, flush=True)
            lines.append(row)
    if args.out:
        with args.out.open("a") as file:
            file.write("\n".join(lines) + "\n\n")


if __name__ == "__main__":
    main()
