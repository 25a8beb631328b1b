"""Export a model without its memory as a graph of the same kind, as the reference for a graph with a memory.

It uses the same exporter and target, and the same rewrites except those for a memory, and the graph is called in the
same way. The result has no manifest, tokenizer or configs, so it is not an ONNX folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import PreTrainedModel

from deltamem_tool._compat import OnnxExporter
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.export.rewrites import optimize
from deltamem_tool.onnx.export.targets import Target
from deltamem_tool.onnx.export.trace import trace_model


def without_memory(interface: Interface) -> Interface:
    """Return the interface of the graph of the same model without its memory."""
    layers = tuple(dataclasses.replace(layer, state=None) for layer in interface.layers)
    return dataclasses.replace(interface, segment=0, layers=layers)


def write_plain(
    model: PreTrainedModel,
    options: CallOptions,
    interface: Interface,
    target: Target,
    folder: Path,
) -> None:
    """Write the graph and its weights into the new `folder`.

    Args:
        model: the model, whose memory has been detached.
        options: options for calling it, created while it had a memory.
        interface: from `without_memory`.
        target: the target that will run the graph.
        folder: folder that does not exist yet.
    """
    program = trace_model(model, None, interface, options, target)
    optimize(program, target)
    folder.mkdir(parents=True)
    OnnxExporter.save_program(program, folder / contract.MODEL_FILE)
