"""Load the engine for the model that a command names: an adapter in PyTorch, or an ONNX folder in ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import click

from deltamem_tool.base_model.launch import join_launched, launch_rank
from deltamem_tool.cli.options import torch_device
from deltamem_tool.io.installation import RUNTIME, check_installation, is_installed
from deltamem_tool.onnx.contract import MANIFEST_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltamem_tool.chat.engine import Engine
    from deltamem_tool.chat.torch_engine import TorchModel

# What `--device` takes beside devices: where there is room for each layer, and a share of each layer a process.
AUTO, TENSOR_PARALLEL = "auto", "tp"


def check_runtime_options(is_onnx: bool, provider: str | None, **for_adapter: Any) -> None:
    """Raise if an option is for the other runtime; `for_adapter` are those that an ONNX folder does not take."""
    unusable = [f"--{name.replace('_', '-')}" for name, value in for_adapter.items() if value]
    if is_onnx and unusable:
        raise click.UsageError(f"{', '.join(unusable)}: only for an adapter; this is an ONNX folder.")
    if not is_onnx and provider:
        raise click.UsageError(f"--provider: only for an ONNX folder, which has a {MANIFEST_FILE}.")


def onnx_engine(folder: str, provider: str | None) -> Engine:
    """Return the engine of an ONNX folder."""
    check_installation(RUNTIME)
    from deltamem_tool.onnx.runtime.engine import OnnxModel

    return OnnxModel(folder, provider or "cpu")


def shipped_engine(name: str) -> Engine | None:
    """Return the engine, in ONNX Runtime, of an adapter that the package ships; it is exported the first time.

    None where `name` is another, or what runs or exports it is not installed.
    """
    from deltamem_tool.cli.console import STDERR, quiet_libraries, stages
    from deltamem_tool.onnx.export.shipped import export_shipped, is_shipped, shipped_folder

    if not is_shipped(name) or not is_installed(RUNTIME):
        return None
    folder = shipped_folder(name)
    if not folder.is_dir():
        if not is_installed("export"):
            return None
        quiet_libraries()
        STDERR.print(f"Exporting {name} for ONNX Runtime, once, to {folder}", highlight=False, soft_wrap=True)
        with stages() as report:
            export_shipped(name, report)
    return onnx_engine(str(folder), None)


def torch_engine(adapter: str, device: str | None, loading: dict[str, Any]) -> Engine:
    """Return the engine of an adapter, which `load` takes with the options `loading`.

    With `TENSOR_PARALLEL` it is the first process that asks for one; the others are to `follow_engine`.
    """
    if device != TENSOR_PARALLEL:
        return _torch_model(adapter, device, loading)
    model = _joined_model(adapter, loading)
    from deltamem_tool.chat.leader_model import LeaderModel

    leader = LeaderModel(model)
    click.get_current_context().call_on_close(leader.close)
    return leader


def is_follower(device: str | None) -> bool:
    """Return whether this process only follows another one."""
    return device == TENSOR_PARALLEL and launch_rank() > 0


def follow_engine(adapter: str, loading: dict[str, Any]) -> None:
    """Do what the first process does with its `torch_engine`, until it has ended."""
    model = _joined_model(adapter, loading)
    from deltamem_tool.chat.leader_model import follow_leader

    follow_leader(model)


def _joined_model(adapter: str, loading: dict[str, Any]) -> TorchModel:
    check_installation("torch")
    join_launched()
    return _torch_model(adapter, TENSOR_PARALLEL, loading)


def _torch_model(adapter: str, device: str | None, loading: dict[str, Any]) -> TorchModel:
    check_installation("torch")
    from deltamem_tool.base_model.tokenizer import tokenizer_of
    from deltamem_tool.chat.torch_engine import TorchModel
    from deltamem_tool.cli.console import quiet_libraries

    quiet_libraries()
    model = load_on(device, adapter, loading)
    return TorchModel(model, tokenizer_of(model, for_chat=False))


def load_on(device: str | None, adapter: str, loading: dict[str, Any]) -> PreTrainedModel:
    """Load an adapter with its base on `device`, which may be `AUTO` or `TENSOR_PARALLEL`."""
    import torch

    from deltamem_tool.adapter.load import load

    if device == AUTO:
        return load(adapter, **loading, device_map="auto")
    if device == TENSOR_PARALLEL:
        from transformers import DistributedConfig

        if not torch.distributed.is_initialized():
            raise click.UsageError(f"--device {device}: start it with torchrun or accelerate launch.")
        return load(adapter, **loading, distributed_config=DistributedConfig(tp_plan="auto"))
    where = torch_device(device)
    model = load(adapter, **loading)
    cast(torch.nn.Module, model).to(where)  # transformers hides the signature
    return model
