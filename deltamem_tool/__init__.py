"""δ-mem for Hugging Face causal language models: attach, train, export, run."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "DeltaMemConfig": "config",
    "DeltaMemError": "errors",
    "MemoryCache": "state",
    "MemoryState": "state",
    "attach": "surgery",
    "convert": "reference",
    "detach": "surgery",
    "encode_chat": "segments",
    "load": "adapter",
    "save_adapter": "adapter",
}
_LIGHT = ("config", "errors")  # modules that need nothing which could be of a wrong version
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from deltamem_tool.adapter import load as load
    from deltamem_tool.adapter import save_adapter as save_adapter
    from deltamem_tool.config import DeltaMemConfig as DeltaMemConfig
    from deltamem_tool.errors import DeltaMemError as DeltaMemError
    from deltamem_tool.reference import convert as convert
    from deltamem_tool.segments import encode_chat as encode_chat
    from deltamem_tool.state import MemoryCache as MemoryCache
    from deltamem_tool.state import MemoryState as MemoryState
    from deltamem_tool.surgery import attach as attach
    from deltamem_tool.surgery import detach as detach


def __getattr__(name: str):
    """Import on first use: the command line and the ONNX runtime must not wait for torch."""
    from importlib import import_module

    if name in _HOME:
        if _HOME[name] not in _LIGHT:
            from deltamem_tool.installation import check_installation

            check_installation("torch", "transformers")
        return getattr(import_module(f"deltamem_tool.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
