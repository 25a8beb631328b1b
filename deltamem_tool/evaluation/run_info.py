"""The part `run` of evaluation.json: what somebody needs who wants to do the evaluation again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from deltamem_tool.adapter.config_file import BaseModel
from deltamem_tool.io.formats import versions
from deltamem_tool.memory.attach import adapter_of

if TYPE_CHECKING:
    from deltamem_tool.evaluation.result import Evaluation


def run_json(
    model: PreTrainedModel, found: Evaluation, command: Sequence[str], options: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """The part `run` of `evaluation.json`, without a path of the machine that did it.

    Args:
        model: with its adapter.
        command: the words that were typed.
        options: what decides answers or their order beside the task and the protocol, such as the batch size.
        seconds: that this run took, which may have found answers of an earlier one.
    """
    adapter, device = adapter_of(model), model.device
    made_for = adapter.made_for
    base = asdict(made_for) if isinstance(made_for, BaseModel) else None
    if base is not None:
        base["name"] = without_folders(base["name"])
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "options": {
            **{name: plain(value) for name, value in options.items() if value is not None},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "mechanism": adapter.config.to_dict(),
        "base": base,
        "versions": versions(),
        "cost": {
            "seconds": round(seconds, 1),
            "asked": found.asked,
            "answers": len(found.records),
            "prompt_tokens": sum(record.prompt_tokens for record in found.records),
        },
    }


def plain(value: Any) -> Any:
    """For JSON and for strangers: a path is its last part."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return without_folders(str(value)) if isinstance(value, str | Path) else value


def without_folders(text: str) -> str:
    """Of a path here, or an absolute one, the last part; of `KEY=PATH`, the same behind the key. Others stay, such as
    names on the Hub."""
    key, equals, value = text.rpartition("=")
    try:
        is_path = Path(value).is_absolute() or Path(value).exists()
    except (OSError, ValueError):  # too long for a path
        is_path = False
    return f"{key}{equals}{Path(value).name}" if is_path and Path(value).name else text
