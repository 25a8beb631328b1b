"""`bench`: load the models once, time them in turn, then find the peak memory of each alone."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.baselines.lora import Lora, lora_parameters
from deltamem_tool.bench import LORA, MEMORY, ONNX, PYTORCH
from deltamem_tool.bench.graphs import GraphFolder, read_export, write_graphs
from deltamem_tool.bench.machine import cpu_name
from deltamem_tool.bench.models import equip, load_apart, torch_sides, twin_of, vocabulary
from deltamem_tool.bench.peak import Peak, peak_of
from deltamem_tool.bench.result import Bench, Sizes
from deltamem_tool.bench.setting import Setting, name_of
from deltamem_tool.bench.sides import OnnxSide, Side, TorchSide
from deltamem_tool.bench.timing import Timed, interleaved
from deltamem_tool.io.formats import versions
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.onnx.export.targets import NO_QUANTIZATION
from deltamem_tool.onnx.export.trace import dtype_name
from deltamem_tool.onnx.runtime.graph import usable_cores

_OPTIONAL = ("peft", "onnxruntime", "onnxruntime-gpu")  # packages that are not always there

Report = Callable[[str, int, int], object]  # what is done now, steps done, of


def bench(setting: Setting, peaks: bool = True, report: Report = lambda what, done, of: None) -> Bench:
    """Measure what the adapter's memory costs.

    Args:
        setting: what, and how.
        peaks: find the peak memory too, in a process for each model and runtime.
        report: called as steps begin.

    Raises:
        DeltaMemError: the adapter, its base, the LoRA or the export are not there, are damaged, or do not belong
            together; or prompts are longer than the model takes.
    """
    steps = _Steps(setting, peaks, report)
    own, threads = torch.get_num_threads(), setting.threads or usable_cores()
    setting = dataclasses.replace(setting, threads=threads)
    described, export = read_adapter(setting.adapter), None
    if setting.lora is not None:  # what can be refused before the base is loaded is
        Lora.read(setting.lora).check_base_name([name for name in (setting.base, described.base.name) if name])
    if setting.onnx is not None:
        export = read_export(setting, setting.onnx, described.fingerprint)
        setting = dataclasses.replace(setting, dtype=export[1].interface.dtype)
    steps.tell("loading")
    model, adapter = load_apart(setting, setting.dtype)
    setting = dataclasses.replace(setting, dtype=dtype_name(model.dtype))
    try:
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as scratch:
            about = _about(setting, model, adapter, described.base.name)
            about["quantize"] = export[1].quantize if export else NO_QUANTIZATION  # of the graphs
            graphs: dict[str, GraphFolder] = {}
            if ONNX in setting.runtimes:
                graphs = write_graphs(model, adapter, setting, export, Path(scratch), steps.tell)
            timed = _timed(model, adapter, setting, graphs, steps)
            sizes = _sizes(model, adapter, setting, Path(scratch))  # after them: now it is on the device
            del model, adapter  # the processes that follow need the room
            found = Bench(setting, about, timed, _peaks(setting, graphs, steps) if peaks else {}, sizes)
            steps.tell("")
            return found
    finally:
        torch.set_num_threads(own)


class _Steps:
    """Counts what is done: a visit of a side, or the process of one."""

    def __init__(self, setting: Setting, peaks: bool, report: Report) -> None:
        sides = len(setting.models) * len(setting.runtimes)
        self._of = sides * (len(setting.prompts) * (setting.repeats + 1) + peaks)
        self._done, self._report = 0, report

    def tell(self, what: str) -> None:
        self._report(what, self._done, self._of)

    def begin(self, what: str) -> None:
        """A step, which is done when the next one begins."""
        self.tell(what)
        self._done += 1


def _timed(
    model: PreTrainedModel,
    adapter: DeltaMemAdapter,
    setting: Setting,
    graphs: dict[str, GraphFolder],
    steps: _Steps,
) -> dict[int, Timed]:
    """By prompt."""
    sides: dict[str, Side] = {}
    if PYTORCH in setting.runtimes:
        made = torch_sides(model, adapter, setting)
        sides |= {name_of(PYTORCH, name): side for name, side in made.items()}
    for name, graph in graphs.items():
        sides[name_of(ONNX, name)] = OnnxSide(graph.folder, graph.interface, setting.provider, setting.threads)
    timed = {}
    for prompt in setting.prompts:
        ids = setting.ids(prompt, vocabulary(model))

        def begin(name: str, prompt: int = prompt) -> None:
            steps.begin(f"{name}, {prompt} tokens")

        timed[prompt] = interleaved(sides, ids, setting.decode, setting.repeats, setting.seed, begin)
    return timed


def _peaks(setting: Setting, graphs: dict[str, GraphFolder], steps: _Steps) -> dict[str, Peak]:
    found = {}
    for runtime in setting.runtimes:
        for name in setting.models:
            steps.begin(f"memory of {name_of(runtime, name)}")
            graph = graphs[name] if runtime == ONNX else None
            found[name_of(runtime, name)] = peak_of(setting, runtime, name, graph)
    return found


def _sizes(model: PreTrainedModel, adapter: DeltaMemAdapter, setting: Setting, scratch: Path) -> Sizes:
    """Of one conversation, as it is written and as the base model's cache holds it."""
    one = dataclasses.replace(setting, batch_size=1)
    memory, file = adapter.empty_memory(1), scratch / "memory.safetensors"
    memory.save(file)
    plain, held = TorchSide(model), {}
    for prompt in setting.prompts:
        _, past = plain.call(one.ids(prompt, vocabulary(model)))
        tensors = [getattr(layer, part, None) for layer in past.layers for part in ("keys", "values")]
        held[prompt] = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    return Sizes(file.stat().st_size, memory.nbytes, held)


def _about(setting: Setting, model: PreTrainedModel, adapter: DeltaMemAdapter, base: str | None) -> dict[str, Any]:
    """What was compared, and on what; `base` is what the adapter calls its base model."""
    parameters = {MEMORY: sum(parameter.numel() for parameter in adapter.parameters())}
    ranks = {}
    if LORA in setting.models:
        lora = equip(LORA, twin_of(model), adapter, setting)
        parameters[LORA] = lora_parameters(lora)
        ranks = {"lora_rank": lora.active_peft_config.r}
    machine = {"cpu": cpu_name(), "gpu": torch.cuda.get_device_name(setting.device) if setting.on_cuda else None}
    return {
        "base_model": setting.base or base,
        "adapter_fingerprint": adapter.fingerprint,
        "parameters": parameters,
        **ranks,
        "machine": {**machine, "threads": setting.threads},
        "packages": versions(*_OPTIONAL),
    }
