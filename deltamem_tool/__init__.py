"""δ-mem for Hugging Face causal language models: attach, train, export, run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltamem_tool._version import __version__ as __version__

# Where each name is, and which extras of the installation it needs.
_HOME: dict[str, tuple[str, tuple[str, ...]]] = {
    "Conversation": ("chat.conversation", ()),
    "DeltaMemConfig": ("config", ()),
    "DeltaMemError": ("errors", ()),
    "MemoryCache": ("memory.cache", ("torch",)),
    "MemoryState": ("memory.state", ("torch",)),
    "OnnxModel": ("onnx.runtime.engine", ("cpu",)),
    "TorchModel": ("chat.torch_engine", ("torch",)),
    "attach": ("adapter.attach", ("torch",)),
    "convert": ("adapter.reference.convert", ("torch",)),
    "detach": ("adapter.attach", ("torch",)),
    "encode_chat": ("segments.encode", ("torch",)),
    "evaluate": ("evaluation.runner", ("eval",)),
    "export_onnx": ("onnx.export.export", ("export", "cpu")),
    "load": ("adapter.load", ("torch",)),
    "pull": ("hub.pull", ()),
    "push": ("hub.push", ()),
    "save_adapter": ("adapter.save", ("torch",)),
    "train": ("training.run", ("train",)),
    "without_memory": ("memory.decoder_call", ("torch",)),
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from deltamem_tool.adapter.attach import attach as attach
    from deltamem_tool.adapter.attach import detach as detach
    from deltamem_tool.adapter.load import load as load
    from deltamem_tool.adapter.reference.convert import convert as convert
    from deltamem_tool.adapter.save import save_adapter as save_adapter
    from deltamem_tool.chat.conversation import Conversation as Conversation
    from deltamem_tool.chat.torch_engine import TorchModel as TorchModel
    from deltamem_tool.config import DeltaMemConfig as DeltaMemConfig
    from deltamem_tool.errors import DeltaMemError as DeltaMemError
    from deltamem_tool.evaluation.runner import evaluate as evaluate
    from deltamem_tool.hub.pull import pull as pull
    from deltamem_tool.hub.push import push as push
    from deltamem_tool.memory.cache import MemoryCache as MemoryCache
    from deltamem_tool.memory.decoder_call import without_memory as without_memory
    from deltamem_tool.memory.state import MemoryState as MemoryState
    from deltamem_tool.onnx.export.export import export_onnx as export_onnx
    from deltamem_tool.onnx.runtime.engine import OnnxModel as OnnxModel
    from deltamem_tool.segments.encode import encode_chat as encode_chat
    from deltamem_tool.training.run import train as train


def __getattr__(name: str) -> object:
    """Import a name on first use, so that the command line and ONNX Runtime do not have to wait for torch."""
    from importlib import import_module

    if name in _HOME:
        module, extras = _HOME[name]
        if extras:
            from deltamem_tool.io.installation import check_installation

            check_installation(*extras)
        globals()[name] = getattr(import_module(f"deltamem_tool.{module}"), name)  # the next time it is there
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
