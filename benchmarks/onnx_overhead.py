"""Measure the cost of a memory in ONNX Runtime, compared with the graph of the base model without one.

Command: python benchmarks/onnx_overhead.py [--checkpoint DIR | --random LAYERS] [--memories tsw,msw]
    [--precisions float32,int4] [--past 256,2048] [--prefill 512,2048] [--exports 3 --openings 4 --repeats 4]
    [--threads 1] [--layers 4,8,16,32] [--control] [--profile] [--folder DIR] [--out FILE.md]

The base model is SmolLM2-135M-Instruct, which is downloaded, or the given checkpoint, or a random one of SmolLM2's
shape. onnxruntime-genai's model builder writes its graph, and `deltamem export` the one with a memory (TSW on q and o,
MSW on all four branches, random weights). Each export is a separate process, timed as a whole; exports that are
compared take turns. Then two graphs at a time run in turn in this process: the builder's with keys and values in one
buffer, as in onnxruntime-genai, and ours as `OnnxModel` runs it. Both return only the logits of the last token
(`--builder-options ""` selects the builder's default, those of every token). In float32, the logits are compared
first: with a memory that is empty and is not written, they must be the same.

The position of the weights in memory changes decoding times by up to a tenth, and of two equal graphs, the one opened
first was slower. Therefore memory is allocated in large pages (with a tunable of glibc, for which this script restarts
itself), one graph is opened and closed before all others, and each pair is opened several times in either order.
`--control` compares the builder's graph with itself, to show the remaining effect.

`--layers` adds a table of export times for random checkpoints with these numbers of layers, and `--profile` shows where
the time goes. With `--folder`, exported graphs are kept there and reused by later runs.
"""

import argparse
import collections
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import smollm2
from common import PACKAGES, Command, Seconds, spread, timed, versions, watched
from genai_builder import BuilderSide, build

from deltamem_tool.bench.sides import GraphFolder, OnnxSide, Side
from deltamem_tool.bench.timing import cpu_name, interleave
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.onnx.contract import DATA_FILE, MODEL_FILE
from deltamem_tool.onnx.manifest import Manifest
from deltamem_tool.onnx.runtime.buffered_graph import open_graph

BUILDER = "builder"
MEMORIES = {"tsw": ("q,o", "TSW on q, o"), "msw": ("q,k,v,o", "MSW on q, k, v, o")}  # by preset: branches, title
QUANTIZE = {"float32": "none", "int4": "int4"}  # the names of `deltamem export`
DECODED = 4  # tokens of one timed decode
PROFILED = 5  # number of timings in a profile; the shortest counts
TOLERANCE = 1e-3  # allowed difference of float32 logits, as for an export
LARGE_PAGES = "glibc.malloc.hugetlb=1"  # lets malloc use pages of 2 MB if the system has them
COMPARED = (40, 1, 1, 1, 9, 1)  # tokens of the calls whose logits are compared
Graphs = dict[tuple[str, str], Path]  # by precision, and BUILDER or the memory's preset


class Exports:
    """Exports of one checkpoint below a folder, and the cost of each."""

    def __init__(self, checkpoint: Path, folder: Path, builder_options: list[str]) -> None:
        self._checkpoint, self._folder, self._options = checkpoint, folder, builder_options
        self.commands: dict[tuple[str, str], list[Command]] = collections.defaultdict(list)

    def path(self, precision: str, name: str) -> Path:
        return self._folder / f"{name}-{precision}"

    def make(self, precision: str, name: str) -> None:
        """Export once."""
        out = self.path(precision, name)
        print(f"    exporting {out.name}", file=sys.stderr, flush=True)
        if name == BUILDER:
            command = build(self._checkpoint, out, precision, self._options)
        else:
            adapter = self._folder / f"{name}-adapter"
            if not adapter.exists():
                memory = ("--preset", name, "--branches", MEMORIES[name][0], "--delta-init", "random")
                watched("-m", "deltamem_tool", "patch", self._checkpoint, "--out", adapter, *memory)
            quantize = ("--quantize", QUANTIZE[precision])
            command = watched("-m", "deltamem_tool", "export", adapter, "--out", out, *quantize, "--overwrite")
        self.commands[precision, name].append(command)

    def rows(self, precision: str, names: list[str]) -> Iterator[str]:
        """Yield the table's rows of one precision: medians, and the median ratio to the builder in the same turn."""
        base, base_size = self.commands[precision, BUILDER], size(self.path(precision, BUILDER))
        for name in names:
            taken, on_disk = self.commands[precision, name], size(self.path(precision, name))
            cells = ["–"] * 4
            if taken:
                cells = [
                    f"{statistics.median(one.of_processor for one in taken):.1f} s",
                    ratio([one.of_processor / other.of_processor for one, other in zip(taken, base, strict=True)]),
                    f"{statistics.median(one.seconds for one in taken):.1f} s",
                    f"{statistics.median(one.resident for one in taken) / 1e9:.2f} GB",
                ]
            cells += [f"{on_disk:.0f} MB", f"{on_disk / base_size:.2f}"]
            yield f"| {precision} | {title(name)} | {' | '.join(cells)} |"


def size(folder: Path) -> float:
    """Return the size of the graph and its weights in megabytes."""
    return sum((folder / name).stat().st_size for name in (MODEL_FILE, DATA_FILE)) / 1e6


def title(name: str) -> str:
    return "builder's, no memory" if name == BUILDER else MEMORIES[name][1]


def ratio(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def open_side(folder: Path, name: str, args: argparse.Namespace) -> Side:
    """Open the graph in `folder` as it is normally run."""
    if name == BUILDER:
        timings = max(args.repeats + 1, PROFILED)
        longest = max([*args.prefill, *(past + timings * DECODED for past in args.past)])  # of a text
        return BuilderSide(folder, longest, args.threads)
    return OnnxSide(GraphFolder(folder, Manifest.read(folder).interface), "cpu", args.threads)


def random_tokens(seed: int, tokens: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng((seed, tokens)).integers(vocab_size, size=(1, tokens))


def difference(builder: Path, ours: Path, threads: int) -> float:
    """Return the largest difference of the logits over a few calls, without writes into the memory."""
    base, interface = BuilderSide(builder, sum(COMPARED), threads), Manifest.read(ours).interface
    graph = open_graph(ours, interface, threads=threads)
    length, past, found = 0, graph.empty_past(1), []
    for i, tokens in enumerate(COMPARED):
        ids = random_tokens(i, tokens, interface.vocab_size)
        expected, length = base.call(ids, length)
        ends = np.zeros(ids.shape, bool) if interface.segment else None
        logits, past = graph.step(ids, np.ones((1, length), np.int64), np.zeros(ids.shape, bool), past, ends)
        found.append(float(np.abs(logits[:, -1] - expected).max()))
    return max(found)


class Decode:
    """A side that decodes continuously after a prompt of `past` tokens."""

    def __init__(self, side: Side, past: int) -> None:
        self._side = side
        _, self._past = side.call(random_tokens(0, past, smollm2.SHAPE["vocab_size"]))
        self._token = np.ones((1, 1), np.int64)

    def _feed(self) -> None:
        _, self._past = self._side.call(self._token, self._past)

    def __call__(self) -> Seconds:
        """Return the seconds per token."""
        return timed(self._feed, DECODED)


def prefill(side: Side, tokens: int) -> Seconds:
    """Return the seconds of a prompt."""
    ids = random_tokens(1, tokens, smollm2.SHAPE["vocab_size"])
    return timed(lambda: side.call(ids))


def measurements(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[Side], Callable[[], Seconds]]]]:
    """Yield the measurements: a name, and a function that creates the measurement of a side."""
    for past in args.past:
        yield f"decode, {past} past", partial(Decode, past=past)
    for tokens in args.prefill:
        yield f"prefill, {tokens}", lambda side, tokens=tokens: partial(prefill, side, tokens)


def pairs(args: argparse.Namespace, exports: Exports, precision: str, name: str) -> dict[str, list[list[Seconds]]]:
    """Return the results of every measurement, by name: pairs of seconds, with a memory and of the builder's graph."""
    taken = collections.defaultdict(list)
    for opening in range(args.openings):
        order = (("with", name), ("without", BUILDER))[:: -1 if opening % 2 else 1]
        sides = {key: open_side(exports.path(precision, each), each, args) for key, each in order}
        for what, measurement in measurements(args):
            rounds = interleave(
                {key: measurement(side) for key, side in sides.items()}, args.repeats, seed=opening
            ).values
            taken[what] += zip(rounds["with"], rounds["without"], strict=True)
            gc.collect()
        del sides
        gc.collect()
    return taken


def speed_rows(args: argparse.Namespace, exports: Exports) -> Iterator[str]:
    prefill(open_side(exports.path(args.precisions[0], BUILDER), BUILDER, args), 1)
    gc.collect()
    for precision in args.precisions:
        for name in ([BUILDER] if args.control else []) + args.memories:
            more = nodes(exports.path(precision, name)) - nodes(exports.path(precision, BUILDER))
            for what, taken in pairs(args, exports, precision, name).items():
                mine, others = (statistics.median(clock for clock, _ in side) for side in zip(*taken, strict=True))
                by_clock, of_processor = ([a[i] / b[i] for a, b in taken] for i in (0, 1))
                yield (
                    f"| {precision} | {title(name)} | {what} | {1e3 * mine:.2f} ms | {1e3 * others:.2f} ms "
                    f"| {spread(of_processor)} | {spread(by_clock)} | {more:+d} |"
                )


def nodes(folder: Path) -> int:
    return len(onnx.load(folder / MODEL_FILE, load_external_data=False).graph.node)


@contextmanager
def profiled(prefix: Path) -> Iterator[None]:
    """Make sessions opened in the block write a profile when they are closed."""
    make = onnxruntime.SessionOptions

    def with_profile() -> onnxruntime.SessionOptions:
        made = make()
        made.enable_profiling, made.profile_file_prefix = True, str(prefix)
        return made

    with mock.patch.object(onnxruntime, "SessionOptions", with_profile):
        yield


def profiles(args: argparse.Namespace, exports: Exports) -> Iterator[str]:
    """Yield the time of a call by operator: the sum of the shortest time of each node."""
    for precision in args.precisions:
        for name in (BUILDER, *args.memories):
            for what, measurement in measurements(args):
                with tempfile.TemporaryDirectory() as folder:
                    with profiled(Path(folder) / "profile"):
                        side = open_side(exports.path(precision, name), name, args)
                    measure = measurement(side)
                    for _ in range(PROFILED):
                        measure()
                    del measure, side
                    gc.collect()
                    (file,) = Path(folder).iterdir()
                    events = json.loads(file.read_text())
                took: dict[str, dict[str, int]] = collections.defaultdict(dict)
                for event in events:
                    if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                        of_operator, node = took[event["args"]["op_name"]], event["name"]
                        of_operator[node] = min(event["dur"], of_operator.get(node, event["dur"]))
                total = sum(sum(taken.values()) for taken in took.values())
                yield f"\n{precision}, {title(name)}, {what}: {total} µs\n"
                for operator, taken in sorted(took.items(), key=lambda item: -sum(item[1].values())):
                    yield f"    {sum(taken.values()):9d} µs  {len(taken):4d} × {operator}"


def layer_rows(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Yield export times by the number of layers, and the slope between the smallest and the largest."""
    name, of_processor = args.memories[0], {}
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            checkpoint = smollm2.random_checkpoint(Path(scratch) / "checkpoint", layers)
            exports = Exports(checkpoint, Path(scratch), args.builder_options)
            for _ in range(args.exports):
                for each in (BUILDER, name):
                    exports.make("float32", each)
            taken = {each: exports.commands["float32", each] for each in (BUILDER, name)}
        base, ours = (statistics.median(one.of_processor for one in taken[each]) for each in (BUILDER, name))
        of_processor[layers] = (base, ours)
        ratios = [one.of_processor / other.of_processor for one, other in zip(taken[name], taken[BUILDER], strict=True)]
        peak = statistics.median(one.resident for one in taken[name]) / 1e9
        yield f"| {layers} | {ours:.1f} s | {base:.1f} s | {ratio(ratios)} | {peak:.2f} GB |"
    if len(of_processor) > 1:
        least, most = min(of_processor), max(of_processor)
        slopes = [(b - a) / (most - least) for a, b in zip(of_processor[least], of_processor[most], strict=True)]
        yield f"| one more | {slopes[1]:.2f} s | {slopes[0]:.2f} s | | |"


EXPORTS = """
Export: the whole command as medians, ratios in the same turn as median and range, and the size on disk:

| precision | graph | CPU time | ratio to the builder | wall-clock time | peak memory | folder | of the builder's |
|---|---|---|---|---|---|---|---|"""
SPEED = """
Running, in turn: medians, and ratios to the builder's graph as median (quartiles; range). Decoding starts after this
number of tokens:

| precision | memory | tokens | with | builder's, without | CPU time | wall-clock time | more nodes |
|---|---|---|---|---|---|---|---|"""
LAYERS = """
Export by the number of layers, float32, random weights, {title}, CPU time:

| layers | with a memory | builder's, without | ratio | peak memory |
|---|---|---|---|---|"""


def lines(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Yield the lines of the report. Exit this process if the two graphs do not compute the same."""
    checkpoint, base = base_of(args, folder)
    yield (
        f"{date.today()}, {cpu_name()}, {args.threads} thread(s), Python {platform.python_version()}, "
        f"{versions(*PACKAGES, 'onnxruntime-genai-cuda', 'onnxruntime-genai')}; {base}; {args.exports} exports, "
        f"{args.openings} times {args.repeats} pairs of runs; "
        f"builder's options: {' '.join(args.builder_options) or 'none'}."
    )
    exports, names = Exports(checkpoint, folder, args.builder_options), [BUILDER, *args.memories]
    yield EXPORTS
    for precision in args.precisions:
        missing = [name for name in names if not exports.path(precision, name).exists()]
        for _ in range(args.exports if missing else 0):
            for name in names:  # all in turn, because ratios compare exports of the same turn
                exports.make(precision, name)
        yield from exports.rows(precision, names)
    if "float32" in args.precisions:
        yield ""
        for name in args.memories:
            found = difference(exports.path("float32", BUILDER), exports.path("float32", name), args.threads)
            yield f"Logits of {title(name)} while the memory is empty: {found:.1e} from the builder's at most."
            if not found <= TOLERANCE:
                sys.exit(f"The graphs do not compute the same: {found:.1e} is more than {TOLERANCE:.0e}.")
    if args.past or args.prefill:
        yield SPEED
        yield from speed_rows(args, exports)
    if args.profile:
        yield from profiles(args, exports)
    if args.layers:
        yield LAYERS.format(title=title(args.memories[0]))
        yield from layer_rows(args, folder)
    yield ""


def base_of(args: argparse.Namespace, folder: Path) -> tuple[Path, str]:
    """Return the folder of the checkpoint and its description."""
    if args.checkpoint:
        return args.checkpoint, args.checkpoint.name
    layers = args.random
    if not layers:
        try:
            return smollm2.fetch(), "SmolLM2-135M-Instruct"
        except DeltaMemError as error:
            print(f"{error}\nA random checkpoint of its shape is used instead.", file=sys.stderr)
            layers = smollm2.LAYERS
    checkpoint = folder / f"random-{layers}"
    if not checkpoint.exists():
        smollm2.random_checkpoint(checkpoint, layers)
    return checkpoint, f"random weights, SmolLM2's shape, {layers} layers"


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""

    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    def numbers(text: str) -> list[int]:
        return [int(word) for word in words(text)]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--checkpoint", type=Path, help="a Hugging Face folder")
    base.add_argument("--random", type=int, metavar="LAYERS", help="random weights of SmolLM2's shape")
    parser.add_argument("--memories", type=words, default=list(MEMORIES), help=f"some of {','.join(MEMORIES)}")
    parser.add_argument("--precisions", type=words, default=list(QUANTIZE), help=f"some of {','.join(QUANTIZE)}")
    parser.add_argument("--past", type=numbers, default=[256, 2048], help="numbers of tokens before decoding")
    parser.add_argument("--prefill", type=numbers, default=[512, 2048], help="lengths of the prompts in tokens")
    for name, default in {"exports": 3, "openings": 4, "repeats": 4, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--builder-options", type=str.split, default=["prune_lm_head=true"], help="KEY=VALUE …")
    parser.add_argument(
        "--layers", type=numbers, default=[], help="numbers of layers for a table of export times, such as 4,8,16"
    )
    parser.add_argument("--control", action="store_true", help="also compare the builder's graph with itself")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    parser.add_argument("--folder", type=Path, help="keep the graphs in this folder, and reuse those that are there")
    parser.add_argument("--out", type=Path, help="append the tables to this file")
    return parser.parse_args(arguments)


def main() -> None:
    args = options()
    if LARGE_PAGES not in os.environ.get("GLIBC_TUNABLES", ""):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GLIBC_TUNABLES": LARGE_PAGES})
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        for line in lines(args, folder):
            print(line, flush=True)
            if args.out:  # line by line, so that results are kept if something fails later
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
