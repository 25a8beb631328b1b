"""The targets of an export, with their operators, data types and quantisations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deltamem_tool.errors import ExportError
from deltamem_tool.onnx.contract import BFLOAT16, FLOAT16, FLOAT32
from deltamem_tool.onnx.manifest import Quantization

NO_QUANTIZATION, INT8, INT4 = "none", "int8", "int4"
WASM_MEMORY = 2**32  # bytes that WebAssembly can address with 32 bits, for weights and everything else
PORTABLE_OPSET = 18  # the opset that torch exports to; later ones would be conversions from it


@dataclass(frozen=True)
class Target:
    """One kind of runtime.

    Args:
        fusions: the ONNX Runtime provider whose fused operators the graph uses; None for standard operators only.
        scan: the implementation of `deltamem_tool.ops` that is traced.
        opset: opset of standard operators; None for the exporter's default.
        dtypes: supported types of the base model's weights, and of keys and values. State and scan are always float32.
        quantizations: supported quantisations of the base model's weights.
        genai: whether onnxruntime-genai loads the folder, with its names and configuration, and only inputs it feeds.
        max_bytes: maximum size of the weights that the runtime can hold, in bytes; None for no limit.
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
        """Whether its graphs are for any runtime: they only have standard operators, and pass ONNX's checker."""
        return self.fusions is None


TARGETS = {
    target.name: target
    for target in (
        # ONNX Runtime's CPU provider supports float16 (computed mostly in float32), but has no MatMul for bfloat16.
        Target("cpu", "cpu", "onnx", None, (FLOAT32, FLOAT16), (NO_QUANTIZATION, INT8, INT4)),
        Target("cuda", "cuda", "onnx", None, (FLOAT32, FLOAT16, BFLOAT16), (NO_QUANTIZATION, INT8, INT4)),
        Target("portable", None, "portable", PORTABLE_OPSET, (FLOAT32,), (NO_QUANTIZATION,)),
        # onnxruntime-web has the operators of the CPU provider, and runs them in WebAssembly or on WebGPU.
        Target("web", "cpu", "onnx", None, (FLOAT32, FLOAT16), (NO_QUANTIZATION, INT8, INT4), max_bytes=WASM_MEMORY),
        Target("genai", "cpu", "onnx", None, (FLOAT32,), (NO_QUANTIZATION, INT8, INT4), genai=True),
    )
}
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)
# Supported data types of each quantisation.
QUANTIZATIONS = {NO_QUANTIZATION: DTYPES, INT8: (FLOAT32, FLOAT16), INT4: (FLOAT32, FLOAT16)}
BITS = {INT8: 8, INT4: 4}
GROUP_SIZES = (16, 32, 64, 128, 256)  # supported by ONNX Runtime's operators
GROUP_SIZE = 32
SYMMETRIC = {INT8: True, INT4: False}
_TYPE_BITS = {FLOAT32: 32, FLOAT16: 16, BFLOAT16: 16}


def check_size(target: Target, parameters: int, dtype: str, quantize: str) -> None:
    """Check that the target's runtime can hold the weights.

    Args:
        target: target of the graph.
        parameters: number of weights.
        dtype: type of the weights.
        quantize: quantisation; the check assumes that it applies to all weights.

    Raises:
        ExportError: the weights are too large.
    """
    size = parameters * (BITS.get(quantize) or _TYPE_BITS[dtype]) // 8
    if target.max_bytes is not None and size > target.max_bytes:
        raise ExportError(
            f"The model is too large for the target {target.name}.",
            f"Its weights take {size:,} bytes; the limit is {target.max_bytes:,}.",
            "Choose a smaller model, --dtype float16 or --quantize int4.",
        )


def target_of(name: str, dtype: str, quantize: str) -> Target:
    """Return the target `name`, after checking that it supports the type and the quantisation.

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


def quantization_of(
    quantize: str, group_size: int = GROUP_SIZE, symmetric: bool | None = None, width: int | None = None
) -> Quantization | None:
    """Return the settings of the quantisation `quantize`; None if it is "none".

    Args:
        quantize: a name in `QUANTIZATIONS`.
        group_size: number of weights of one output that share a scale.
        symmetric: whether to quantise without offsets; None means the default, `SYMMETRIC`.
        width: width of the model, which groups must divide; None if it is not known yet.

    Raises:
        ExportError: no operator supports groups of this size, or they do not divide the width.
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
    return Quantization(BITS[quantize], group_size, SYMMETRIC[quantize] if symmetric is None else symmetric)
