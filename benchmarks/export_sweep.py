"""Export a tiny random model of every type that supports a memory, and tabulate which exports work.

    python benchmarks/export_sweep.py --out benchmarks/results/DATE-export-sweep.md [TYPE …]

Each type runs in a separate process. Results are added to a `.jsonl` beside OUT as they come, and an interrupted run
continues from there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("tests", "recipes")]

CPU_SECONDS = 120  # limit for one type
DEPTH = 4  # layers: two rounds of a pattern of two
PACKAGES = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime", "onnxscript")


def attempt(model_type: str) -> dict:
    from base_model.test_export_sweep import TOLERANCE, exported_difference

    from deltamem_tool.errors import DeltaMemError

    with tempfile.TemporaryDirectory() as folder, counted_copies() as copies:
        try:
            found = exported_difference(model_type, Path(folder) / "onnx", DEPTH)
        except DeltaMemError as error:
            return {"error": " ".join(str(error).splitlines()[:2])}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    if not found.plain <= TOLERANCE:
        return {"error": f"differs from PyTorch by {found.plain:.1g} in one call"}
    layers, copied = copies[-1]
    attention = "fused" if found.packed else fusion_obstacle(model_type)
    return {
        "plain": found.plain,
        "padded": found.padded,
        "attention": attention,
        "traced": layers - copied,
        "layers": layers,
    }


@contextlib.contextmanager
def counted_copies() -> Iterator[list[tuple[int, int]]]:
    """Record, for each graph created in the block, its number of layers and how many of them are copies."""
    from deltamem_tool.onnx.export import trace

    counts = []

    class Counting(trace.TracedLayers):
        def __init__(self, *args):
            super().__init__(*args)
            counts.append((len(self.names), len(self.copies)))

    original, trace.TracedLayers = trace.TracedLayers, Counting
    try:
        yield counts
    finally:
        trace.TracedLayers = original


def fusion_obstacle(model_type: str) -> str:
    from base_model.test_export_sweep import patched

    from deltamem_tool import MemoryCache
    from deltamem_tool.memory.call_options import CallOptions
    from deltamem_tool.onnx.export import attention

    model = patched(model_type, DEPTH)
    if not CallOptions(model, "all").counts_positions:
        return "counts positions by itself"
    return attention.fusion_obstacle(model, len(MemoryCache(model).layers)) or ""


def in_a_process(model_type: str) -> dict:
    """Run one type in a fork of this process, which has imported everything."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        gc.disable()  # tracing creates millions of objects, and the process is short-lived
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        with os.fdopen(writer, "w") as file:
            json.dump(attempt(model_type), file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = file.read()
    _, _, used = os.wait4(child, 0)
    result = json.loads(answer) if answer else {"error": f"did not finish within {CPU_SECONDS} s"}
    return {"type": model_type, **result, "seconds": round(used.ru_utime + used.ru_stime, 1)}


def table(results: list[dict]) -> str:
    from base_model.test_export_sweep import TOLERANCE

    installed = [time.strftime("%Y-%m-%d")]
    for name in PACKAGES:
        try:
            installed.append(f"{name} {version(name)}")
        except Exception:
            continue
    works = [result for result in results if "plain" in result]
    lines = [
        "# Export to ONNX, by model type",
        "",
        f"{len(works)} of {len(results)} types that support a memory. {', '.join(installed)}.",
        "",
        "Tiny random models in float32, rank 4 on q and o. The first figure is the largest difference of logits and",
        "states between three calls of the graph in ONNX Runtime (5, 1 and 4 tokens) and one call of PyTorch. The",
        "second is for a row that is padded on the left in the batch and alone in PyTorch. If it is large, the model",
        "itself counts padding. Models have four layers in the type's pattern; identical ones are traced once.",
        "Attention is one operator if it computes the same as the model's.",
        "",
        "| model type | difference | padded | layers traced | attention | error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in sorted(results, key=lambda result: result["type"]):
        if "plain" in result:
            padded = f"{result['padded']:.1e}" if result["padded"] <= TOLERANCE else "counts padding"
            traced = f"{result['traced']} of {result['layers']}" if result["layers"] else "all"
            lines.append(
                f"| `{result['type']}` | {result['plain']:.1e} | {padded} | {traced} | {result['attention']} | |"
            )
        else:
            lines.append(f"| `{result['type']}` | | | | | {result['error'].replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    log = arguments.out.with_suffix(".jsonl")
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    warnings.simplefilter("ignore")
    import torch
    from base_model.test_sweep import TEXT, VISION

    from deltamem_tool._compat import OnnxExporter  # noqa: F401  imported before the processes fork

    torch.set_num_threads(1)
    attempt("llama")  # in this process, so that one-time work is not repeated in every fork
    gc.collect()
    gc.freeze()
    for model_type in arguments.types or [*TEXT, *VISION]:
        if any(result["type"] == model_type for result in results):
            continue
        result = in_a_process(model_type)
        print(json.dumps(result), flush=True)
        results.append(result)
        with log.open("a") as file:
            file.write(json.dumps(result) + "\n")
    arguments.out.write_text(table(results))


if __name__ == "__main__":
    main()
