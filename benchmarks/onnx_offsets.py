"""Measure what the offsets of 4-bit blocks cost in ONNX Runtime on a CPU: time of a product, and its error.

Command: python benchmarks/onnx_offsets.py [--repeats 15]

`--quantize int4` stores a block of 32 weights as s·q + c. Its products are compared with those of symmetric blocks,
s·q, and with the operator's own floating zero points, which stand for the same weights. The weights have the format of
GGUF's Q4_1. All kinds run in turn, on one thread; times are CPU time over that of symmetric blocks.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from common import PACKAGES, versions
from onnx import TensorProto, helper, numpy_helper, save

from deltamem_tool.bench.timing import cpu_name
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.export.quantize import quantize_graph
from deltamem_tool.onnx.export.quantized_matrices import ACCURACY_LEVEL, quantize_columns
from deltamem_tool.onnx.manifest import Quantization

SIZES, TOKENS, GROUP, PRODUCTS = ((576, 1536), (1024, 3072)), (1, 64, 512), 32, 8
SYMMETRIC, OFFSETS, ZERO_POINTS = "symmetric", "offsets", "floating zero points"


def q4_1_weights(size: tuple[int, int]) -> np.ndarray:
    """Return weights `[K, N]` of which each group of a column has 16 values at equal distances."""
    random = np.random.default_rng(0)
    groups = (size[0] // GROUP, 1, size[1])
    numbers = random.integers(0, 16, (groups[0], GROUP, groups[2]))
    numbers[:, 0], numbers[:, 1] = 0, 15
    scales, lowest = random.uniform(0.005, 0.02, groups), random.uniform(-0.2, -0.05, groups)
    return (numbers * scales + lowest).reshape(size).astype(np.float32)


def write_graph(folder: Path, nodes: list, arrays: dict[str, np.ndarray], width: int) -> None:
    """Write a graph from x `[T, K]` to the outputs y0, y1, …"""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", width])
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["T", None]) for i in range(PRODUCTS)]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "products", [x], outputs, initializers)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    folder.mkdir()
    save(model, folder / contract.MODEL_FILE, save_as_external_data=True, location=contract.DATA_FILE, size_threshold=0)


def sessions(folder: Path, weight: np.ndarray) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Return a function from x to the first of `PRODUCTS` products with different weights, by kind."""
    weights = {f"w{i}": np.roll(weight, GROUP * i, axis=0) for i in range(PRODUCTS)}
    for kind in (SYMMETRIC, OFFSETS):
        nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(PRODUCTS)]
        write_graph(folder / kind, nodes, weights, len(weight))
        quantize_graph(folder / kind, Quantization(4, GROUP, kind == SYMMETRIC), [])
    nodes, arrays = [], {}
    attributes = {"K": weight.shape[0], "N": weight.shape[1], "bits": 4, "block_size": GROUP}
    for i, matrix in enumerate(weights.values()):
        numbers, scales, offsets = quantize_columns(matrix, Quantization(4, GROUP, False))
        arrays |= {f"q{i}": numbers, f"s{i}": scales, f"z{i}": 8 - offsets.T.astype(np.float32) / scales}
        inputs = ["x", f"q{i}", f"s{i}", f"z{i}"]
        nodes.append(
            helper.make_node(
                "MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", accuracy_level=ACCURACY_LEVEL, **attributes
            )
        )
    write_graph(folder / ZERO_POINTS, nodes, arrays, len(weight))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found = {}
    for kind in (SYMMETRIC, OFFSETS, ZERO_POINTS):
        session = onnxruntime.InferenceSession(folder / kind / contract.MODEL_FILE, options)
        found[kind] = lambda x, session=session: session.run(None, {"x": x})[0]
    return found


def measure(
    kinds: dict[str, Callable[[np.ndarray], np.ndarray]], x: np.ndarray, repeats: int
) -> dict[str, list[float]]:
    """Return the CPU time of each round, by kind, after a first one."""
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(repeats + 1):
        for kind, run in kinds.items():
            start = time.process_time()
            run(x)
            seconds[kind].append(time.process_time() - start)
    return {kind: values[1:] for kind, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    print(f"{cpu_name()}, {versions(*PACKAGES)}\n")
    print("| K × N | tokens | | time | largest error, relative |\n|---|---|---|---|---|")
    for size in SIZES:
        weight = q4_1_weights(size)
        with tempfile.TemporaryDirectory() as scratch:
            kinds = sessions(Path(scratch), weight)
            for tokens in TOKENS:
                x = np.random.default_rng(1).normal(size=(tokens, size[0])).astype(np.float32)
                exact, seconds = x @ weight, measure(kinds, x, args.repeats)
                for kind, run in kinds.items():
                    ratio = statistics.median(a / b for a, b in zip(seconds[kind], seconds[SYMMETRIC], strict=True))
                    error = np.abs(run(x) - exact).max() / np.abs(exact).max()
                    print(f"| {size[0]} × {size[1]} | {tokens} | {kind} | {ratio:.2f} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()
