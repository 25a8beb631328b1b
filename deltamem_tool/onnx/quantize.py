"""The base's weights of an exported graph in 8 or 4 bits. The memory's stay float32, bit by bit.

Quantised are the constant matrices `[in, out]` of the base's products (MatMul, Gemm). What stays as it is: the memory,
the embedding, the matrix that makes the logits, and whatever is no such product.

* int8: ONNX Runtime's dynamic quantisation, a scale for every output channel; activations are quantised as they come.
* int4: weights alone, in blocks of the input dimension (`MatMulNBits`); activations stay as they are.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnxruntime.quantization import QuantType, quantize_dynamic

from deltamem_tool.adapter_module import DeltaMemAdapter
from deltamem_tool.errors import ExportError
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.lean import LeanMemory
from deltamem_tool.onnx.targets import INT4, INT8

BLOCK_SIZE = 32  # of int4: the smallest that all of ONNX Runtime's kernels take


def memory_weights(adapter: DeltaMemAdapter, lean: Mapping[int, LeanMemory]) -> list[NDArray]:
    """Every matrix of the memory as the graph holds it, float32 `[in, out]`; `lean`: what was traced in its place."""
    weights = chain.from_iterable(memory.matrices() for memory in lean.values()) if lean else adapter.parameters()
    return [weight.detach().cpu().numpy().T for weight in weights if weight.dim() == 2]


def quantize_graph(folder: Path, how: str, memory: Sequence[NDArray], vocab_size: int) -> int:
    """Quantise the graph in `folder`, in place; how many matrices that were.

    Args:
        folder: holds `model.onnx` and its data; both are replaced.
        how: "int8" or "int4".
        memory: the memory's matrices, from `memory_weights`.
        vocab_size: V: a matrix `[in, V]` makes the logits.

    Raises:
        ExportError: the memory's weights are not found in the graph as they are, or there is nothing to quantise.
    """
    path = folder / contract.MODEL_FILE
    model = onnx_ir.load(path)
    common.NameFixPass()(model)  # the quantisers know nodes by their names
    names = _choose(model.graph, _Columns(memory), vocab_size)
    if not names:
        raise ExportError(
            f"There is nothing to quantise as {how}.",
            "No product of the base with a constant matrix was found in the graph.",
            "Export it without --quantize.",
        )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        before, after = Path(scratch) / "before.onnx", Path(scratch) / "after.onnx"
        onnx_ir.save(model, before, external_data="before.onnx.data")
        _without_inner_shapes(before)
        del model  # its weights are mapped from the files that are replaced below
        {INT8: _to_int8, INT4: _to_int4}[how](before, after, names)
        quantized = onnx_ir.load(after)
        onnx_ir.external_data.load_to_model(quantized)
        onnx_ir.save(quantized, path, external_data=contract.DATA_FILE)
    return len(names)


def _to_int8(before: Path, after: Path, names: set[str]) -> None:
    with _quiet():
        quantize_dynamic(
            before,
            after,
            per_channel=True,
            reduce_range=True,  # products of 8 by 8 bits overflow the 16-bit sums of x86 processors without VNNI
            weight_type=QuantType.QInt8,
            nodes_to_quantize=sorted(names),
            use_external_data_format=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # it does not know ONNX Runtime's operators
        )


def _to_int4(before: Path, after: Path, names: set[str]) -> None:
    model = onnx.load(before)
    # Its `nodes_to_include` come on top of every MatMul.
    others = [node.name for node in model.graph.node if node.name not in names]
    with _quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(model, block_size=BLOCK_SIZE, is_symmetric=False, nodes_to_exclude=others)
        quantizer.process()
        quantizer.model.save_model_to_file(str(after), use_external_data_format=True)


class _Columns:
    """The columns of the memory's matrices: by them its weights are known wherever the fusions have put them."""

    def __init__(self, memory: Sequence[NDArray]) -> None:
        # By length and content. A column of zeros says nothing about whose it is.
        self._by_length: dict[int, dict[bytes, NDArray]] = {}
        for weight in memory:
            for column in np.ascontiguousarray(weight.T):
                if column.any():
                    self._by_length.setdefault(len(column), {})[column.tobytes()] = column
        self._found: set[bytes] = set()

    def among(self, weight: NDArray) -> bool:
        """Whether any is a column of `weight` `[in, out]`; it counts as found then."""
        known = self._by_length.get(len(weight), {})
        # Most columns differ in their first number: the base's need not be copied to be told apart.
        first = np.array([column[0] for column in known.values()], weight.dtype)
        candidates = (weight[:, i].tobytes() for i in np.flatnonzero(np.isin(weight[0], first)))
        found = known.keys() & set(candidates)
        self._found |= found
        return bool(found)

    def check_all_found(self) -> None:
        missing = sum(len(columns.keys() - self._found) for columns in self._by_length.values())
        if missing:
            raise ExportError(
                "The memory's weights cannot be told from the base's in this graph.",
                f"{missing} columns of them are not in it as they are: other weights were joined to them.",
                "Export it without --quantize.",
            )


def _choose(graph: onnx_ir.Graph, memory: _Columns, vocab_size: int) -> set[str]:
    """Names of the products to quantise, all of them MatMul afterwards."""
    names = set()
    for node in list(graph):
        if node.domain or node.op_type not in ("MatMul", "Gemm"):
            continue
        constant = node.inputs[1].const_value if node.inputs[1] is not None else None
        if constant is None or len(constant.shape) != 2:
            continue
        matrix = constant.numpy()
        matrix = matrix.T if node.attributes.get_int("transB", 0) else matrix
        if memory.among(matrix) or not matrix.any() or matrix.shape[1] == vocab_size:
            continue
        if node.op_type == "MatMul":
            names.add(node.name or "")
        elif _is_plain(node):
            names.add(_as_matmul(graph, node, np.ascontiguousarray(matrix)))
    memory.check_all_found()
    return names


def _is_plain(gemm: onnx_ir.Node) -> bool:
    """A · B, or A · B + C, and nothing else."""
    get = gemm.attributes.get_float
    return get("alpha", 1.0) == get("beta", 1.0) == 1.0 and gemm.attributes.get_int("transA", 0) == 0


def _as_matmul(graph: onnx_ir.Graph, gemm: onnx_ir.Node, matrix: NDArray) -> str:
    """Replace `gemm` by MatMul and Add; `matrix` is its weight, `[in, out]`. The name of the MatMul."""
    name, output = f"{gemm.name}_matmul", gemm.outputs[0]
    weight = onnx_ir.Value(name=f"{name}_weight", const_value=onnx_ir.tensor(matrix, name=f"{name}_weight"))
    graph.register_initializer(weight)
    nodes = [onnx_ir.node("MatMul", [gemm.inputs[0], weight], name=name)]
    nodes[0].outputs[0].type = output.type
    if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
        nodes.append(onnx_ir.node("Add", [nodes[0].outputs[0], gemm.inputs[2]], name=f"{gemm.name}_add"))
    onnx_ir.convenience.replace_nodes_and_values(graph, gemm, [gemm], nodes, [output], [nodes[-1].outputs[0]])
    return name


def _without_inner_shapes(path: Path) -> None:
    """What the fusions left behind of them is not always so, and the quantisers would refuse the graph."""
    model = onnx.load(path, load_external_data=False)
    del model.graph.value_info[:]
    onnx.save(model, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without ONNX Runtime's advice to run a pre-processing that is for vision models, and with what its module for
    4 bits does to the root logger, when it is imported, undone."""
    root = logging.getLogger()
    disabled, level, handlers = root.manager.disable, root.level, root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
