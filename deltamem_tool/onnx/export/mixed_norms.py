"""Repair operators created by transformers' fusions that ONNX Runtime rejects.

In half precision, a norm whose weights are computed in float32 (Gemma's and Qwen3.5's 1 + w) is fused with the sum
before it into one operator, which accepts only one dtype.
"""

from __future__ import annotations

import onnx_ir as ir

from deltamem_tool.onnx.export.graph_edits import copy_dtype, node_input, replace_uses

_SKIP_NORM, _NORM = "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"


def split_mixed_norms(graph: ir.Graph) -> None:
    """Split each fused sum and norm whose types differ into two operators."""
    for node in [node for node in graph if node.op_type == _SKIP_NORM]:
        first, second, scale = (node_input(node, position) for position in range(3))
        if first.dtype == second.dtype == scale.dtype:
            continue
        add = ir.node("Add", [first, second])
        add.outputs[0].shape = first.shape
        copy_dtype(first, add.outputs[0])
        attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-5), "stash_type": 1}
        norm = ir.node(_NORM, [add.outputs[0], scale], attributes=attributes)
        graph.insert_before(node, [add, norm])
        replace_uses(node.outputs[0], norm.outputs[0])
        if len(node.outputs) > 3:
            replace_uses(node.outputs[3], add.outputs[0])
        graph.remove(node, safe=True)
