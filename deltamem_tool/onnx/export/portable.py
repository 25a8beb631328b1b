"""Check graphs for any ONNX runtime: they only have standard operators of one opset, and pass ONNX's checker."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedOpsetsPass

from deltamem_tool.errors import ExportError, first_line

_STANDARD = ("", "ai.onnx")  # two names of the same domain


def require_standard(program: onnx_ir.Model, model: str) -> None:
    """Check that every operator of `program`, including those in loops, is a standard one; drop other domains.

    Args:
        program: the graph; its list of opsets is changed.
        model: name of the model, for the error.

    Raises:
        ExportError: a node belongs to another domain, or its operator is not in the opset.
    """
    opset = program.opset_imports[""]
    others = {f"{domain}::{name}" for domain, name, _ in program.functions}
    for graph in program.graphs():
        for node in graph:
            # Some of ONNX Runtime's own operators are in ONNX's domain, so checking the domain is not enough.
            if node.domain not in _STANDARD or not onnx.defs.has(node.op_type, opset, ""):
                others.add(f"{node.domain or 'ai.onnx'}::{node.op_type}")
    if others:
        raise ExportError(
            f"{model} cannot be written in standard ONNX operators.",
            f"It needs {', '.join(sorted(others)[:3])}, which opset {opset} does not have.",
            "Choose a target that may use operators of its runtime, such as cpu.",
        )
    RemoveUnusedOpsetsPass()(program)


def check_file(path: Path) -> None:
    """Check the file with ONNX's checker, including type and shape inference.

    Raises:
        ExportError: the file is not valid.
    """
    try:
        onnx.checker.check_model(path, full_check=True)  # by path, because a graph with its weights may exceed 2 GB
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            "The graph is not valid ONNX.",
            f"{first_line(error)}.",
            "Nothing was written. Please report this, with the name of the base model.",
        ) from error
