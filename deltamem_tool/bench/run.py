"""Run a benchmark: load the models once, time them in turn, then measure the peak memory of each alone."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.baselines.lora import Lora, lora_parameters
from deltamem_tool.bench import LORA, MEMORY, ONNX, PYTORCH
from deltamem_tool.bench.models import (
    load_apart,
    modify_model,
    read_export,
    shared_copy,
    torch_sides,
    vocabulary,
    write_graphs,
)
from deltamem_tool.bench.peak import peak_of
from deltamem_tool.bench.result import BenchResult, Sizes
from deltamem_tool.bench.setting import Setting, name_of
from deltamem_tool.bench.sides import GraphFolder, OnnxSide, Side, TorchSide
from deltamem_tool.bench.timing import Rounds, Seconds, cpu_name, interleave, time_generation
from deltamem_tool.io.cores import default_threads
from deltamem_tool.io.formats import versions
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.onnx.export.interface import dtype_name
from deltamem_tool.onnx.export.targets import NO_QUANTIZATION

_OPTIONAL = ("peft", "onnxruntime", "onnxruntime-gpu")  # packages that need not be installed

Report = Callable[[str, int, int], object]  # current step, number of finished steps, total


def bench(setting: Setting, peaks: bool = True, report: Report = lambda step, done, of: None) -> BenchResult:
    """Measure the cost of the adapter's memory.

    Args:
        setting: the setting of the benchmark.
        peaks: whether to measure peak memory too, in a separate process per model and runtime.
        report: called when a step begins.

    Raises:
        DeltaMemError: the adapter, its base model, the LoRA or the export is missing or damaged, they do not belong
            together, or prompts are longer than the model supports.
    """
    threads_before, threads = torch.get_num_threads(), setting.threads or default_threads()
    setting = dataclasses.replace(setting, threads=threads)
    folder, export = read_adapter(setting.adapter), None
    if setting.lora is not None:  # check this before the base model is loaded
        Lora.read(setting.lora).check_base_name([name for name in (setting.base, folder.base.name) if name])
    if setting.onnx is not None:
        export = read_export(setting, setting.onnx, folder.fingerprint)
        setting = dataclasses.replace(setting, dtype=export[1].interface.dtype)
    steps = _Steps(setting, peaks, report)
    steps.show("loading")
    model, adapter = load_apart(setting, setting.dtype)
    setting = dataclasses.replace(setting, dtype=dtype_name(model.dtype))
    try:
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            about = _about(setting, model, adapter, folder.base.name)
            about["quantize"] = export[1].quantize if export else NO_QUANTIZATION  # of the graphs
            graphs: dict[str, GraphFolder] = {}
            if ONNX in setting.runtimes:
                graphs = write_graphs(model, adapter, setting, export, scratch, steps.show)
            rounds = _time(model, adapter, setting, graphs, steps)
            sizes = _sizes(model, adapter, setting, scratch)  # the model is on the device by now
            del model, adapter  # free memory for the processes that follow
            by_side = {}
            for runtime, model_name in setting.sides if peaks else ():
                side = name_of(runtime, model_name)
                steps.begin(f"memory of {side}")
                by_side[side] = peak_of(setting, runtime, model_name, graphs[model_name] if runtime == ONNX else None)
            steps.show("")
            return BenchResult(setting, about, rounds, by_side, sizes)
    finally:
        torch.set_num_threads(threads_before)


class _Steps:
    """Counts steps: visits of a side, and its process."""

    def __init__(self, setting: Setting, peaks: bool, report: Report) -> None:
        self._of = len(setting.sides) * (len(setting.prompts) * (setting.repeats + 1) + peaks)
        self._done, self._report = 0, report

    def show(self, step: str) -> None:
        self._report(step, self._done, self._of)

    def begin(self, step: str) -> None:
        """Begin a step. It ends when the next one begins."""
        self.show(step)
        self._done += 1


def _time(
    model: PreTrainedModel, adapter: DeltaMemAdapter, setting: Setting, graphs: dict[str, GraphFolder], steps: _Steps
) -> dict[int, Rounds[Seconds]]:
    """Visit all sides in turn; return the durations by prompt."""
    sides: dict[str, Side] = {}
    if PYTORCH in setting.runtimes:
        sides |= {name_of(PYTORCH, name): side for name, side in torch_sides(model, adapter, setting).items()}
    for name, graph in graphs.items():
        sides[name_of(ONNX, name)] = OnnxSide(graph, setting.provider, setting.threads)
    rounds = {}
    for prompt in setting.prompts:
        ids = setting.ids(prompt, vocabulary(model))
        visits = {name: partial(time_generation, side, ids, setting.decode) for name, side in sides.items()}

        def begin(name: str, prompt: int = prompt) -> None:
            steps.begin(f"{name}, {prompt} tokens")

        rounds[prompt] = interleave(visits, setting.repeats, setting.seed, begin)
    return rounds


def _sizes(model: PreTrainedModel, adapter: DeltaMemAdapter, setting: Setting, scratch: Path) -> Sizes:
    one = dataclasses.replace(setting, batch_size=1)
    memory, file = adapter.empty_memory(1), scratch / "memory.safetensors"
    memory.save(file)
    side, cache_bytes = TorchSide(model), {}
    for prompt in setting.prompts:
        _, past = side.call(one.ids(prompt, vocabulary(model)))
        tensors = [getattr(layer, part, None) for layer in past.layers for part in ("keys", "values")]
        cache_bytes[prompt] = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    return Sizes(file.stat().st_size, memory.nbytes, cache_bytes)


def _about(setting: Setting, model: PreTrainedModel, adapter: DeltaMemAdapter, base: str | None) -> dict[str, Any]:
    """Describe the models, the machine and the packages; `base` is the base model's name in the adapter."""
    parameters = {MEMORY: sum(parameter.numel() for parameter in adapter.parameters())}
    ranks = {}
    if LORA in setting.models:
        lora = modify_model(LORA, shared_copy(model), adapter, setting)
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
