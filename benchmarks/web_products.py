"""Time products with weights of 32, 8 and 4 bits in WebAssembly and in ONNX Runtime, on one thread each.

Command: python benchmarks/web_products.py --node-modules DIR

The graph is a chain of 48 products with matrices of 1024 × 1024. Like those of a model, their weights do not fit into
the CPU's cache. The figures are CPU milliseconds of a call with one row (a token) and with 64 (a prompt), as medians of
nine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

SIZE, COUNT, GROUP = 1024, 48, 32
ROWS = (1, 64)
WARM, REPEATS = 15, 9
KINDS = {
    "float32: MatMul": None,
    "8 bits per column, rows too: DynamicQuantizeMatMul": "columns",
    "8 bits in groups of 32: MatMulNBits": 8,
    "4 bits in groups of 32: MatMulNBits": 4,
}


def graph(kind: str | int | None) -> onnx.ModelProto:
    """Return a chain of products, with random weights that preserve the scale of their inputs."""
    random = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for number in range(COUNT):
        arrays, options, operator = _product(kind, random)
        names = [f"{part}{number}" for part in range(len(arrays))]
        weights += [numpy_helper.from_array(array, each) for array, each in zip(arrays, names, strict=True)]
        nodes.append(helper.make_node(operator, [name, *names], [f"y{number}"], **options))
        name = f"y{number}"
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["rows", SIZE]) for end in ("x", name)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(nodes, "products", ends[:1], ends[1:], weights)
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def _product(kind, random):
    """Return weights, attributes and operator of a product."""
    norm = SIZE**-0.5
    if kind is None:
        return [(random.standard_normal((SIZE, SIZE)) * norm).astype(np.float32)], {}, "MatMul"
    contrib = {"domain": "com.microsoft"}
    if kind == "columns":
        packed = random.integers(-127, 128, (SIZE, SIZE)).astype(np.int8)
        return [packed, np.full(SIZE, norm / 74, np.float32)], contrib, "DynamicQuantizeMatMul"
    packed = random.integers(0, 256, (SIZE, SIZE // GROUP, GROUP * kind // 8)).astype(np.uint8)
    scales = np.full((SIZE, SIZE // GROUP), norm / 2**kind * 3.5, np.float32)
    options = {"K": SIZE, "N": SIZE, "bits": kind, "block_size": GROUP, "accuracy_level": 4}
    return [packed, scales], contrib | options, "MatMulNBits"


def native(file: Path) -> list[float]:
    """Return the milliseconds for each of `ROWS`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    found = []
    for rows in ROWS:
        x = np.sin(np.arange(rows * SIZE, dtype=np.float32)).reshape(rows, SIZE)
        times = []
        for _ in range(WARM + REPEATS):
            begin = time.process_time()
            session.run(None, {"x": x})
            times.append((time.process_time() - begin) * 1e3)
        found.append(statistics.median(times[WARM:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node-modules", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scripts:
        folder = Path(scripts)
        shutil.copy(Path(__file__).with_suffix(".mjs"), folder)
        (folder / "node_modules").symlink_to(args.node_modules.resolve())
        print(
            f"| ONNX Runtime {onnxruntime.__version__} | 1 row, wasm / native | 64 rows, wasm / native |\n|---|---|---|"
        )
        for number, (name, kind) in enumerate(KINDS.items()):
            file = folder / f"{number}.onnx"
            onnx.save(graph(kind), file)
            command = ["node", "web_products.mjs", *map(str, (SIZE, WARM, REPEATS)), file.name]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
            pairs = zip(json.loads(done.stdout)[file.name], native(file), strict=True)
            print(f"| {name} | {' | '.join(f'{web:.1f} / {own:.1f} ms' for web, own in pairs)} |", flush=True)


if __name__ == "__main__":
    main()
