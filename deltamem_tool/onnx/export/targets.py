"""The targets of an export: the operators each may use, and its data types and quantisations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deltamem_tool.errors import ExportError
from deltamem_tool.onnx.contract import BFLOAT16, FLOAT16, FLOAT32
from deltamem_tool.onnx.manifest import Quantization

NO_QUANTIZATION, INT8, INT4 = "none", "int8", "int4"
WASM_MEMORY = 2**32  # bytes that WebAssembly's 32-bit addresses reach, weights and all else
PORTABLE_OPSET = 18  # what torch translates to; every later one would be a conversion of it


@dataclass(frozen=True)
class Target:
    """One kind of runtime.

    Args:
        fusions: the ONNX Runtime provider whose fused operators the graph uses; None for standard operators alone.
        scan: the implementation of `deltamem_tool.ops` that is traced.
        opset: of standard operators; None for the exporter's own choice.
        dtypes: of the base model's weights and of keys and values. State and scan are float32 whatever they are.
        quantizations: of the base model's weights.
        genai: whether onnxruntime-genai loads the folder: its names and configuration, and no inputs but what it feeds.
        max_bytes: the largest weights that what runs the graph can hold; None for any.
    """

    name: str
    fusions: Literal["cpu", "cuda"] | None
    scan: Literal["onnx", "portable"]
    opset: int | None
    dtypes: tuple[str, ...]
    quantizations: tuple[str, ...]
    genai: bool = False
    max_bytes: int | None = None

    @property
    def is_standard(self) -> bool:
        """Whether its graphs are for any runtime: standard operators, checked by ONNX's own checker."""
        return self.fusions is None


TARGETS = {
    target.name: target
    for target in (
        # ONNX Runtime's CPU provider takes float16 (it computes most of it in float32), and has no bfloat16 MatMul.
        Target("cpu", "cpu", "onnx", None, (FLOAT32, FLOAT16), (NO_QUANTIZATION, INT8, INT4)),
        Target("cuda", "cuda", "onnx", None, (FLOAT32, FLOAT16, BFLOAT16), (NO_QUANTIZATION, INT8, INT4)),
        Target("portable", None, "portable", PORTABLE_OPSET, (FLOAT32,), (NO_QUANTIZATION,)),
        # onnxruntime-web has the operators of the CPU provider, and runs them in WebAssembly or on WebGPU.
        Target("web", "cpu", "onnx", None, (FLOAT32, FLOAT16), (NO_QUANTIZATION, INT8, INT4), max_bytes=WASM_MEMORY),
        Target("genai", "cpu", "onnx", None, (FLOAT32,), (NO_QUANTIZATION, INT8, INT4), genai=True),
    )
}
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)
# What a quantisation takes.
QUANTIZATIONS = {NO_QUANTIZATION: DTYPES, INT8: (FLOAT32, FLOAT16), INT4: (FLOAT32, FLOAT16)}
BITS = {INT8: 8, INT4: 4}
GROUP_SIZES = (16, 32, 64, 128, 256)  # those that ONNX Runtime's operators take
GROUP_SIZE, SYMMETRIC = 32, True
_TYPE_BITS = {FLOAT32: 32, FLOAT16: 16, BFLOAT16: 16}


def check_size(target: Target, parameters: int, dtype: str, quantize: str) -> None:
    """Check that what runs the graph can hold the weights.

    Args:
        target: what runs the graph.
        parameters: how many numbers the weights are.
        dtype: their type.
        quantize: how they are quantised: all of them, for this purpose.

    Raises:
        ExportError: they are too large.
    """
    size = parameters * (BITS.get(quantize) or _TYPE_BITS[dtype]) // 8
    if target.max_bytes is not None and size > target.max_bytes:
        raise ExportError(
            f"The model is too large for the target {target.name}.",
            f"Its weights take {size:,} bytes; the limit is {target.max_bytes:,}.",
            "Choose a smaller model, --dtype float16 or --quantize int4.",
        )


def target_of(name: str, dtype: str, quantize: str) -> Target:
    """The target called `name`, if it can do both.

    Raises:
        ExportError: there is no such target, or it has no operators for the type or the quantisation.
    """
    if name not in TARGETS:
        raise ExportError(f"There is no target {name!r}.", "", f"The targets are {', '.join(TARGETS)}.")
    target = TARGETS[name]
    for problem, wanted, possible in (
        (f"The target {name} does not support models of", dtype, target.dtypes),
        (f"The target {name} does not support the quantisation", quantize, target.quantizations),
        (f"The quantisation {quantize} does not support models of", dtype, QUANTIZATIONS.get(quantize, ())),
    ):
        if wanted not in possible:
            raise ExportError(
                f"{problem} {wanted}.",
                "Its graphs, or their runtime, have no operators for it.",
                f"Choose one of {', '.join(possible)}, or another target.",
            )
    return target


def quantization_of(quantize: str, group_size: int, symmetric: bool, width: int | None = None) -> Quantization | None:
    """How `quantize` is done; None where it is not.

    Args:
        quantize: a name in `QUANTIZATIONS`.
        group_size: weights of one output that share a scale.
        symmetric: without zero points.
        width: of the model, whose embedding has whole groups; None if it is not known yet.

    Raises:
        ExportError: no operator has such groups, or they do not divide the width.
    """
    if quantize == NO_QUANTIZATION:
        return None
    possible = [size for size in GROUP_SIZES if width is None or width % size == 0]
    if group_size not in possible:
        of_width = "" if width is None or group_size not in GROUP_SIZES else f"It does not divide the width, {width}."
        raise ExportError(
            f"Weights cannot be quantised in groups of {group_size}.",
            of_width or "ONNX Runtime's operators do not support groups of this size.",
            f"Choose one of {', '.join(map(str, possible))}." if possible else "Export it without quantisation.",
        )
    return Quantization(BITS[quantize], group_size, symmetric)
