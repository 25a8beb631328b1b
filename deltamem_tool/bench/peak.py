"""The most memory that one side takes, found in a process that holds nothing else.

`python -m deltamem_tool.bench.peak` is that process: it reads what to do as JSON, and prints what it found.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deltamem_tool
from deltamem_tool.bench import LORA, ONNX
from deltamem_tool.bench.setting import Setting, name_of
from deltamem_tool.bench.sides import OnnxSide, Side
from deltamem_tool.bench.timing import visit
from deltamem_tool.errors import DeltaMemError

if TYPE_CHECKING:
    from deltamem_tool.bench.graphs import GraphFolder

_HIGHEST = re.compile(r"VmHWM:\s*(\d+) kB")


@dataclass(frozen=True)
class Peak:
    """Bytes of a process, or on a GPU of the device's memory.

    imports: what the libraries take, before anything is loaded.
    by_prompt: the most beyond that by the end of each prompt and its decode, by its number of tokens. They come one
        after another, the shortest first, so that each is the largest so far.
    """

    imports: int
    by_prompt: dict[int, int]


def peak_of(setting: Setting, runtime: str, model: str, graph: GraphFolder | None) -> Peak:
    """Start the process, and wait for it.

    Raises:
        DeltaMemError: it failed, or was killed.
    """
    said: dict[str, Any] = {"setting": setting.to_json(), "runtime": runtime, "model": model}
    if graph is not None:
        said |= {"folder": str(graph.folder.resolve()), "interface": asdict(graph.interface)}
    paths = [str(Path(deltamem_tool.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(said),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        killed = f"It was stopped by signal {-done.returncode}; the system does so where memory runs out."
        raise DeltaMemError(
            f"The peak memory of {name_of(runtime, model)} was not found.",
            killed if done.returncode < 0 else f"Its process says: {lines[-1] if lines else 'nothing'}",
            "Measure without it: --no-peak.",
        )
    found = json.loads(done.stdout.splitlines()[-1])
    return Peak(found["imports"], {int(prompt): peak for prompt, peak in found["by_prompt"].items()})


def peak_resident() -> int:
    """The most bytes of this process that have been in memory at once."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage, whose figure a process begins with that of the one that started it
        match = _HIGHEST.search(status.read_text())
        assert match is not None
        return int(match[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def main() -> None:
    said = json.loads(sys.stdin.read())
    setting = Setting.from_json(said["setting"])
    onnx = said["runtime"] == ONNX
    if onnx:
        import onnxruntime  # noqa: F401  (counts as imports)

        import deltamem_tool.onnx.runtime.static_graph  # counts too
    else:
        import deltamem_tool.bench.models  # noqa: F401

        if said["model"] == LORA:
            from deltamem_tool.baselines.lora import import_peft

            import_peft()
    now = _on_gpu(setting, onnx) if setting.on_cuda else peak_resident
    imports = now()
    side, vocab_size = _graph(said, setting) if onnx else _model(said["model"], setting)
    by_prompt = {}
    for prompt in sorted(setting.prompts):
        visit(side, setting.ids(prompt, vocab_size), setting.decode)
        by_prompt[prompt] = now() - imports
    print(json.dumps({"imports": imports, "by_prompt": by_prompt}))


def _graph(said: dict[str, Any], setting: Setting) -> tuple[Side, int]:
    from deltamem_tool.onnx.contract import Interface, Layer

    told = said["interface"]
    layers = (
        Layer(**{part: tuple(size) if size else None for part, size in layer.items()}) for layer in told["layers"]
    )
    interface = Interface(**{**told, "layers": tuple(layers)})
    return OnnxSide(Path(said["folder"]), interface, setting.provider, setting.threads), interface.vocab_size


def _model(name: str, setting: Setting) -> tuple[Side, int]:
    import torch

    from deltamem_tool.bench.models import equip, load_apart, vocabulary
    from deltamem_tool.bench.sides import TorchSide

    if setting.threads:
        torch.set_num_threads(setting.threads)
    model, adapter = load_apart(setting, setting.dtype)
    model = equip(name, model, adapter, setting)
    adapter.to(setting.device)
    return TorchSide(model.to(setting.device)), vocabulary(model)


def _on_gpu(setting: Setting, onnx: bool) -> Any:
    """What tells the most bytes of the GPU's memory: by PyTorch's own count, or, of ONNX Runtime, which has none and
    gives nothing back, by what the device has less than before."""
    import torch

    if not onnx:
        return lambda: torch.cuda.max_memory_allocated(setting.device)
    free = torch.cuda.mem_get_info(setting.device)[0]
    return lambda: free - torch.cuda.mem_get_info(setting.device)[0]


if __name__ == "__main__":
    main()
