"""The `run` section of evaluation.json: everything needed to repeat the evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamem_tool.evaluation.conditions import ONNX
from deltamem_tool.io.formats import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltamem_tool.evaluation.result import Evaluation
    from deltamem_tool.onnx.runtime.engine import OnnxModel


def run_json(
    model: PreTrainedModel | OnnxModel,
    evaluation: Evaluation,
    command: Sequence[str],
    options: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Describe a run, without local paths.

    Args:
        model: a model with its adapter, or an ONNX folder.
        evaluation: the result.
        command: the command line.
        options: options that affect answers or their order, besides the task and the protocol, such as the batch size.
        seconds: duration of this run, which may have reused answers of an earlier one.
    """
    machine, mechanism, base, packages = _of_onnx(model) if evaluation.runtime == ONNX else _of_torch(model)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "options": {
            **{name: to_json_value(value) for name, value in options.items() if value is not None},
            "runtime": evaluation.runtime,
            **machine,
        },
        "mechanism": mechanism,
        "base": None if base is None else {**base, "name": without_folders(base["name"])},
        "versions": versions(*packages),
        "cost": {
            "seconds": round(seconds, 1),
            "asked": evaluation.asked,
            "answers": len(evaluation.records),
            "prompt_tokens": sum(record.prompt_tokens for record in evaluation.records),
        },
    }


_Description = tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None, tuple[str, ...]]


def _of_torch(model: Any) -> _Description:
    """Device and data type; the mechanism; the base model; packages that matter."""
    import torch

    from deltamem_tool.adapter.config_file import BaseModel
    from deltamem_tool.base_model.placement import input_device
    from deltamem_tool.memory.attach import adapter_of

    adapter, device = adapter_of(model), input_device(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    base = asdict(adapter.made_for) if isinstance(adapter.made_for, BaseModel) else None
    mechanism = {**adapter.config.to_dict(), "trained_parameters": adapter.num_parameters()}
    return {"device": name, "dtype": str(model.dtype).removeprefix("torch.")}, mechanism, base, ()


def _of_onnx(model: Any) -> _Description:
    manifest = model.manifest
    machine = {"device": model.graph.device, "dtype": manifest.interface.dtype, "quantize": manifest.quantize}
    base = {"name": manifest.base_model or "unknown", "model_type": manifest.model_type}
    return machine, manifest.mechanism, base, ("onnxruntime", "onnxruntime-gpu")


def to_json_value(value: Any) -> Any:
    """Convert a value for JSON and for other readers: a path is shortened to its last part."""
    if isinstance(value, Mapping):
        return {str(key): to_json_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(part) for part in value]
    return without_folders(str(value)) if isinstance(value, str | Path) else value


def without_folders(text: str) -> str:
    """Shorten a local or absolute path to its last part; in `KEY=PATH`, the part after the key.

    Other texts, such as names on the Hub, are not changed.
    """
    key, equals, value = text.rpartition("=")
    try:
        is_path = Path(value).is_absolute() or Path(value).exists()
    except (OSError, ValueError):  # too long for a path
        is_path = False
    return f"{key}{equals}{Path(value).name}" if is_path and Path(value).name else text
