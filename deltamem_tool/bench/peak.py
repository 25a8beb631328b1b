"""Measure the peak memory of one model in one runtime, in a separate process.

The process is `python -m deltamem_tool.bench.peak`. It reads the pickled setting from stdin, and prints JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import deltamem_tool
from deltamem_tool.bench import LORA, ONNX
from deltamem_tool.bench.setting import Setting, name_of
from deltamem_tool.bench.sides import GraphFolder, OnnxSide, Side, TorchSide
from deltamem_tool.bench.timing import time_generation
from deltamem_tool.errors import DeltaMemError

_PEAK = re.compile(r"VmHWM:\s*(\d+) kB")


@dataclass(frozen=True)
class Peak:
    """Peak memory of a process, or of a GPU, in bytes.

    Args:
        imports: memory of the libraries, before anything is loaded.
        by_prompt: the peak beyond that after each prompt and its decoded tokens, by the prompt's number of tokens.
            Prompts run sequentially, the shortest first, so each one sets the peak so far.
    """

    imports: int
    by_prompt: dict[int, int]


def peak_of(setting: Setting, runtime: str, model: str, graph: GraphFolder | None = None) -> Peak:
    """Start the process and wait for its result.

    Raises:
        DeltaMemError: the process failed or was killed.
    """
    paths = [str(Path(deltamem_tool.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    process = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps((setting, runtime, model, graph)),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
    )
    if process.returncode:
        lines = process.stderr.decode(errors="replace").strip().splitlines()
        killed = f"Its process was stopped by signal {-process.returncode}, as happens when memory runs out."
        raise DeltaMemError(
            f"The peak memory of {name_of(runtime, model)} could not be measured.",
            killed if process.returncode < 0 else f"Its process reports: {lines[-1] if lines else 'nothing'}",
            "Measure everything else with --no-peak.",
        )
    result = json.loads(process.stdout.splitlines()[-1])
    return Peak(result["imports"], {int(prompt): peak for prompt, peak in result["by_prompt"].items()})


def peak_resident() -> int:
    """Return the peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # preferred to getrusage, which starts from the parent's peak
        match = _PEAK.search(status.read_text())
        assert match is not None
        return int(match[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def main() -> None:
    """Run the measurement requested on stdin, and print the result."""
    setting, runtime, model, graph = pickle.loads(sys.stdin.buffer.read())
    if graph is not None:
        import onnxruntime  # noqa: F401  (counts as imports)

        import deltamem_tool.onnx.runtime.buffered_graph  # part of the libraries' memory
    else:
        import deltamem_tool.bench.models  # noqa: F401

        if model == LORA:
            from deltamem_tool.baselines.lora import import_peft

            import_peft()
    memory = _gpu_memory(setting, runtime) if setting.on_cuda else peak_resident
    imports = memory()
    if graph is not None:
        side: Side = OnnxSide(graph, setting.provider, setting.threads)
        vocab_size = graph.interface.vocab_size
    else:
        side, vocab_size = torch_side(model, setting)
    by_prompt = {}
    for prompt in sorted(setting.prompts):
        time_generation(side, setting.ids(prompt, vocab_size), setting.decode)
        by_prompt[prompt] = memory() - imports
    print(json.dumps({"imports": imports, "by_prompt": by_prompt}))


def torch_side(name: str, setting: Setting) -> tuple[Side, int]:
    """Return the side of the model `name`, and the size of its vocabulary."""
    import torch

    from deltamem_tool.bench.models import load_apart, modify_model, vocabulary

    if setting.threads:
        torch.set_num_threads(setting.threads)
    model, adapter = load_apart(setting, setting.dtype)
    model = modify_model(name, model, adapter, setting)
    adapter.to(setting.device)
    return TorchSide(model.to(setting.device)), vocabulary(model)


def _gpu_memory(setting: Setting, runtime: str) -> Callable[[], int]:
    """Return a function that returns the GPU memory in use, in bytes.

    PyTorch counts its peak. ONNX Runtime does not, but it never frees memory, so the device's free memory shows it.
    """
    import torch

    if runtime != ONNX:
        return lambda: torch.cuda.max_memory_allocated(setting.device)
    free = torch.cuda.mem_get_info(setting.device)[0]
    return lambda: free - torch.cuda.mem_get_info(setting.device)[0]


if __name__ == "__main__":
    main()
