"""Graphs for any ONNX runtime: only standard operators of one released opset, and valid for ONNX's checker."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedOpsetsPass

from deltamem_tool.errors import ExportError, first_line

_STANDARD = ("", "ai.onnx")  # two names of one domain


def require_standard(program: onnx_ir.Model, model: str) -> None:
    """See that every operator of `program`, those in loops included, is one of ONNX's own; forget other domains.

    Args:
        program: the graph; its list of opsets is changed.
        model: the name of what it computes, for the error.

    Raises:
        ExportError: a node is of another domain, or no operator of its opset.
    """
    opset = program.opset_imports[""]
    others = {f"{domain}::{name}" for domain, name, _ in program.functions}
    for graph in program.graphs():
        for node in graph:
            # ONNX Runtime keeps some operators of its own in ONNX's domain: the domain alone does not tell.
            if node.domain not in _STANDARD or not onnx.defs.has(node.op_type, opset, ""):
                others.add(f"{node.domain or 'ai.onnx'}::{node.op_type}")
    if others:
        raise ExportError(
            f"{model} cannot be written in standard ONNX operators.",
            f"It needs {', '.join(sorted(others)[:3])}, which opset {opset} does not have.",
            "Choose a target with operators of a runtime's own, such as cpu.",
        )
    RemoveUnusedOpsetsPass()(program)


def check_file(path: Path) -> None:
    """Let ONNX's own checker read the file, with its inference of types and shapes.

    Raises:
        ExportError: it found something wrong.
    """
    try:
        onnx.checker.check_model(path, full_check=True)  # by path: a graph with its weights may pass 2 GB
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            "The graph is not valid ONNX.",
            f"{first_line(error)}.",
            "Please report it, with the base model's name; nothing was written.",
        ) from error
