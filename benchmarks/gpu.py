"""Test exported graphs on a GPU: compare them with PyTorch, and measure the cost of the memory, their speed and their
GPU memory.

Command: python benchmarks/gpu.py [--layers 28 --vocabulary 151936] [--dtypes float16,float32] [--past 256,2048]
    [--prompts 4096,16384,32768] [--repeats 15] [--out FILE.md]
To try this script without a GPU: python benchmarks/gpu.py --device cpu, with tiny sizes; the figures then mean nothing.

The model has Qwen3-0.6B's shape and random weights. The script needs deltamem-tool, torch, transformers,
onnxruntime-gpu and onnxruntime-genai-cuda, and no installation of CUDA. In float16, a result is right if its error
against PyTorch in float32 is not much larger than that of PyTorch in float16. In float32, it is right if it differs by
less than an export may.

Decode steps of two graphs run in turn, one by one and as CUDA graphs: one with a memory and a fixed length, and one of
the base model from onnxruntime-genai's model builder, with buffers of the same length. (In float32 there is no such
graph for CUDA, because fused attention over buffers needs half precision.) Prompts are timed in graphs with a memory
whose keys and values grow or have room for the longest prompt, and in the builder's. GPU memory is what the whole GPU
has in use beyond the amount before the graph was loaded, so nothing else should run on it. ONNX Runtime itself reports
which attention kernels it uses.
"""

import argparse
import dataclasses
import gc
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import PACKAGES, Seconds, compare, few_words, qwen3, randomize, spread, timed, versions
from genai_builder import BuilderSide, build
from torch import Tensor
from transformers import PreTrainedModel

from deltamem_tool import DeltaMemConfig, MemoryCache, attach
from deltamem_tool.bench.sides import GraphFolder, OnnxSide, Side
from deltamem_tool.bench.timing import cpu_name
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.export.export import TOLERANCE, export_onnx
from deltamem_tool.onnx.manifest import Manifest
from deltamem_tool.onnx.runtime.buffered_graph import open_graph

DECODED = 32  # tokens of one timed decode
WARM_UP = 64  # tokens
ROOM = 256  # tokens that fit into the longest prompt's graph after it
GIB = 2**30
HALF_PRECISION_ROOM = 2.0  # allowed ratio of its error against float32 to that of PyTorch in half precision
AIM = 1.05  # target ratio of decoding with a memory to decoding without, as CUDA graphs
BASE = "builder's"
BUILDER_OPTIONS = ["prune_lm_head=true"]  # only the logits of the last token, as in the graphs with a memory
KERNELS = "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"  # makes ONNX Runtime print its attention kernels
TINY = {"layers": 1, "vocabulary": 64, "repeats": 3, "past": "8", "prompts": "16,40", "dtypes": "float32"}
REAL = {
    "layers": 28,
    "vocabulary": 151_936,
    "repeats": 15,
    "past": "256,2048",
    "prompts": "4096,16384,32768",
    "dtypes": "float16,float32",
}


@dataclasses.dataclass
class Exported:
    """Graphs of one data type: "growing" and "long" for prompts, and "memory" to compare with `BASE`."""

    folders: dict[str, Path]
    args: argparse.Namespace

    def graph(self, name: str, cuda_graph: bool = False) -> Any:
        """Open a graph with a memory."""
        folder = self.folders[name]
        interface = Manifest.read(folder).interface
        return open_graph(folder, interface, self.args.device, cuda_graph=cuda_graph)

    def side(self, name: str, length: int, cuda_graph: bool = False) -> Side:
        """Open any graph. The builder's has room for `length` tokens."""
        if name == BASE:
            return BuilderSide(self.folders[name], length, 0, self.args.device, cuda_graph)
        folder = self.folders[name]
        graph = GraphFolder(folder, Manifest.read(folder).interface)
        return OnnxSide(graph, self.args.device, None, cuda_graph)


def steps(args: argparse.Namespace) -> int:
    """Return the number of tokens in the longest comparison of decode steps."""
    return max(args.past) + (args.repeats + 2) * DECODED


def export(args: argparse.Namespace, model: PreTrainedModel, checkpoint: Path, folder: Path) -> Exported:
    """Export the graphs in the type of `model`. `checkpoint` is the same model without the memory."""
    dtype, tokenizer = str(model.dtype).removeprefix("torch."), few_words()
    folders = {name: folder / name for name in ("growing", "long", "memory", BASE)}
    for name, length in {"growing": 0, "long": max(args.prompts) + ROOM, "memory": steps(args)}.items():
        print(f"    exporting {name} in {dtype}", file=sys.stderr, flush=True)
        export_onnx(model, tokenizer, folders[name], target=args.device, max_length=length)
    if args.cuda and dtype == contract.FLOAT32:
        del folders[BASE]
    else:
        build(checkpoint, folders[BASE], dtype, BUILDER_OPTIONS, args.device)
    return Exported(folders, args)


def conversation(vocabulary: int) -> list[Tensor]:
    """Return the calls of a conversation, int64 `[1, T]`: a prompt, single tokens, and a longer piece."""
    random = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, tokens), generator=random) for tokens in (40, 1, 1, 1, 9, 1)]


@torch.no_grad()
def in_pytorch(model: PreTrainedModel, calls: list[Tensor]) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Return the logits `[1, V]` of each call, and the states after the last one."""
    cache = MemoryCache(model)
    logits = [model(ids.to(model.device), cache=cache, logits_to_keep=1).logits[:, -1].float().cpu() for ids in calls]
    assert cache.memory is not None
    return logits, {layer: state.float().cpu() for layer, state in cache.memory.layers.items()}


def in_onnx(graph: Any, calls: list[Tensor]) -> tuple[list[Tensor], dict[int, Tensor]]:
    past, columns, logits = graph.empty_past(1), 0, []
    for ids in calls:
        columns += ids.shape[1]
        found, past = graph.step(ids.numpy(), np.ones((1, columns), np.int64), np.ones(ids.shape, bool), past)
        logits.append(torch.from_numpy(found)[:, -1])
    return logits, {layer: torch.from_numpy(state) for layer, state in graph.states(past).items()}


def apart(found: Any, expected: Any) -> tuple[float, float]:
    """Return the largest differences of logits and of states."""
    (logits, states), (other_logits, other_states) = found, expected
    return (
        max(float((a - b).abs().max()) for a, b in zip(logits, other_logits, strict=True)),
        max(float((states[i] - other_states[i]).abs().max()) for i in other_states),
    )


def agreement(
    args: argparse.Namespace, dtype: str, exported: Exported, truth: Any, own: Any, calls: list[Tensor]
) -> Iterator[tuple[str, bool]]:
    """Yield rows, each with whether it is right. `truth` is PyTorch in float32 on the CPU, `own` in this type here."""
    allowed = [HALF_PRECISION_ROOM * difference for difference in apart(own, truth)]
    if dtype == contract.FLOAT32:
        allowed = [TOLERANCE, TOLERANCE]
    for name, recorded in (("growing", False), ("memory", False), *((("memory", True),) if args.cuda else ())):
        graph = exported.graph(name, recorded)
        found = in_onnx(graph, calls)
        from_truth, from_own = apart(found, truth), apart(found, own)
        right = all(difference <= most for difference, most in zip(from_truth, allowed, strict=True))
        how = f"{name}{', CUDA graph' if recorded else ''}"
        yield (
            f"| {dtype} | {how} | {from_own[0]:.1e}, {from_own[1]:.1e} | {from_truth[0]:.1e}, {from_truth[1]:.1e} "
            f"| {allowed[0]:.1e}, {allowed[1]:.1e} | {'yes' if right else '**no**'} |",
            right,
        )
        del graph
        gc.collect()


class Decoding:
    """A side that decodes continuously after a prompt of `past` tokens."""

    def __init__(self, side: Side, prompt: int) -> None:
        self._side, self._past = side, None
        self.feed(prompt)

    def feed(self, tokens: int) -> None:
        _, self._past = self._side.call(np.ones((1, tokens), np.int64), self._past)

    def seconds(self) -> Seconds:
        """Return the seconds per token."""
        return timed(lambda: self.feed(1), DECODED)


def overhead(args: argparse.Namespace, dtype: str, exported: Exported) -> Iterator[str]:
    if BASE not in exported.folders:
        yield f"| {dtype} | no graph without a memory | | | | |"
        return
    for recorded in (False, True) if args.cuda else (False,):
        sides = [exported.side(name, steps(args), recorded) for name in ("memory", BASE)]
        for past in args.past:
            decoding = [Decoding(side, past) for side in sides]
            # The warm-up round records the CUDA graph.
            (mine, other), (ratios, _) = compare(*(one.seconds for one in decoding), args.repeats)
            yield (
                f"| {dtype} | {'CUDA graph' if recorded else 'node by node'} | {past} | {1e3 * mine:.3f} ms, "
                f"{1 / mine:.0f}/s | {1e3 * other:.3f} ms, {1 / other:.0f}/s | {spread(ratios)} |"
            )
            del decoding
            gc.collect()
        del sides
        gc.collect()


def prompts(args: argparse.Namespace, dtype: str, exported: Exported) -> Iterator[str]:
    room = max(args.prompts) + ROOM
    for name in ("growing", "long", *({BASE} & exported.folders.keys())):
        kernels = attention_kernels(exported, name, room)
        before = used(args)
        side = exported.side(name, room)
        for tokens in sorted(args.prompts):  # ONNX Runtime never frees memory: each figure is the peak so far
            Decoding(side, min(tokens, WARM_UP))
            start = time.perf_counter()
            try:
                decoding = Decoding(side, tokens)
            except Exception as error:  # ONNX Runtime's exceptions have no common base; the longest may not fit
                yield f"| {dtype} | {name} | {tokens} | {str(error).splitlines()[0][:200]} | | | {kernels} |"
                break
            took = time.perf_counter() - start
            decoding.seconds()
            (of_token, _), taken = decoding.seconds(), (used(args) - before) / GIB
            yield (
                f"| {dtype} | {name} | {tokens} | {took:.3f} s, {tokens / took:.0f}/s | {1e3 * of_token:.2f} ms, "
                f"{1 / of_token:.0f}/s | {f'{taken:.2f} GiB' if args.cuda else '–'} | {kernels} |"
            )
            del decoding
            gc.collect()
        del side
        gc.collect()


def attention_kernels(exported: Exported, name: str, room: int) -> str:
    """Return the attention kernels that ONNX Runtime reports for a prompt and a step; it only does so on CUDA."""
    with printed() as text, environment(KERNELS, "1"):  # read when a session is created
        decoding = Decoding(exported.side(name, room), WARM_UP)
        decoding.feed(1)
    del decoding
    gc.collect()
    return ", ".join(sorted(set(re.findall(r"SdpaKernel=(\w+)", text())))) or "–"


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def printed() -> Iterator[Callable[[], str]]:
    """Capture stdout inside the block, including that of libraries. The yielded function returns the text."""
    with tempfile.TemporaryFile() as file:
        text = ""
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield lambda: text
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
            file.seek(0)
            text = file.read().decode(errors="replace")


def used(args: argparse.Namespace) -> int:
    """Return the GPU memory in use in bytes, after freeing PyTorch's cached memory."""
    if not args.cuda:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def heading(args: argparse.Namespace) -> str:
    name = torch.cuda.get_device_name() if args.cuda else cpu_name()
    return (
        f"{date.today()}, {name}, {versions(*PACKAGES, 'onnxruntime-genai-cuda')}, "
        f"Python {platform.python_version()}; {args.layers} layers, {args.vocabulary} words, "
        f"{args.repeats} pairs of runs of {DECODED} tokens.\n"
    )


AGREEMENT = """
Largest differences of logits, states:

| type | graph | from PyTorch here | from PyTorch in float32 on the CPU | allowed there | right |
|---|---|---|---|---|---|"""
OVERHEAD = f"""
One token after a past, keys and values in buffers of a fixed length; the target is {AIM} as a CUDA graph:

| type | how | past | with a memory | without | ratio: median (quartiles; range) |
|---|---|---|---|---|---|"""
PROMPTS = """
Prompts, with a memory (keys and values that grow, or have room for the longest) and without (the builder's graph):

| type | graph | prompt | time | per token after it | GPU memory | attention |
|---|---|---|---|---|---|---|"""


def measure(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield the lines of the report, each with False if it reports an error."""
    yield heading(args), True
    torch.manual_seed(0)
    model = qwen3(args.layers, args.vocabulary)
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    few_words().save_pretrained(checkpoint)
    adapter = attach(model, DeltaMemConfig.preset("tsw"))
    randomize(adapter)
    calls = conversation(args.vocabulary)
    for dtype in args.dtypes:
        model.to("cpu", getattr(torch, dtype))
        truth = in_pytorch(model.float(), calls)  # with the weights of this type
        model.to(getattr(torch, dtype))
        exported = export(args, model, checkpoint, folder / dtype)
        own = in_pytorch(model.to(args.device), calls)
        model.to("cpu")  # free the GPU, including the adapter
        adapter.to("cpu")
        gc.collect()
        yield AGREEMENT, True
        yield from agreement(args, dtype, exported, truth, own, calls)
        for title, rows in ((OVERHEAD, overhead), (PROMPTS, prompts)):
            yield title, True
            yield from ((row, True) for row in rows(args, dtype, exported))
    yield "", True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    for name, kind in {"layers": int, "vocabulary": int, "repeats": int}.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--past", help="numbers of tokens before decoding")
    parser.add_argument("--prompts", help="lengths of the prompts")
    parser.add_argument("--dtypes", help="data types of the model")
    parser.add_argument("--out", type=Path, help="append the tables to this file")
    args = parser.parse_args()
    args.cuda = args.device == "cuda"
    for name, default in (REAL if args.cuda else TINY).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.past, args.prompts = ([int(n) for n in text.split(",")] for text in (args.past, args.prompts))
    args.dtypes = args.dtypes.split(",")
    if args.cuda and not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU here. To try this script without one, pass --device cpu.")

    right = True
    with tempfile.TemporaryDirectory() as folder:
        for line, fine in measure(args, Path(folder)):
            print(line, flush=True)
            right = right and fine
            if args.out:  # line by line, so that results are kept if something fails later
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
    sys.exit(0 if right else "The graph does not compute what PyTorch computes.")


if __name__ == "__main__":
    main()
