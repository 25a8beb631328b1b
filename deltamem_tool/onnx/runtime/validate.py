"""Validate an ONNX folder before any runtime loads it, because a graph may come from an untrusted source.

A graph is a program whose operators should only compute. Anything that could do more is rejected: operators of other
packages, functions, weights in other files, and missing values. How much a graph computes cannot be checked. A graph
that takes all memory is stopped by the operating system, like any program.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamem_tool.errors import ExportError, first_line
from deltamem_tool.io.safe_json import read_bytes, read_json
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import DATA_FILE, GENAI_CONFIG_FILE, MODEL_FILE
from deltamem_tool.onnx.manifest import Manifest

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

# Without its weights, which are in another file, a graph of 28 layers has 0.5 MB.
MAX_GRAPH_BYTES = 256 * 2**20
MAX_SIZE = 2**31 - 1  # of one axis; the largest known vocabularies have 2**18 tokens
DOMAINS = ("", "ai.onnx", "com.microsoft")  # ONNX's domain, which has two names, and ONNX Runtime's
# Operators of these domains that run other code, or load it from a file that the graph names.
CALLING_OUT = ("ATen", "EPContext", "PyOp", "PythonOp", "PythonOpGrad", "TritonOp")
STORED_OPTIONS = "ort_config"  # metadata from which ONNX Runtime can be configured to read session options
# Bits per number by ONNX's code for the type, and the field with the numbers if neither a file nor `raw_data` has them.
_TYPES = {
    1: (32, "float_data"),  # float32
    2: (8, "int32_data"),  # uint8
    3: (8, "int32_data"),  # int8
    4: (16, "int32_data"),  # uint16
    5: (16, "int32_data"),  # int16
    6: (32, "int32_data"),  # int32
    7: (64, "int64_data"),  # int64
    9: (8, "int32_data"),  # bool
    10: (16, "int32_data"),  # float16
    11: (64, "double_data"),  # float64
    12: (32, "uint64_data"),  # uint32
    13: (64, "uint64_data"),  # uint64
    16: (16, "int32_data"),  # bfloat16
    21: (4, "int32_data"),  # uint4
    22: (4, "int32_data"),  # int4
}
_EXTERNAL = 1
_PLACE = ("location", "offset", "length")
_LONGEST_NUMBER = 18  # digits of an offset: an exabyte
# Keys that `genai.configuration` writes, by their place in the file.
_GENAI_KEYS: dict[tuple[str, ...], set[str]] = {
    (): {"model", "search"},
    ("model",): {
        *("type", "vocab_size", "context_length", "decoder"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    },
    ("model", "decoder"): {
        *("filename", "session_options", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_size", "hidden_size", "inputs", "outputs"),
    },
    ("model", "decoder", "session_options"): {"log_severity_level", "provider_options"},
}


def check_onnx_folder(folder: str | Path) -> Manifest:
    """Check an ONNX folder as far as possible without a runtime, and return its manifest.

    Raises:
        ExportError: a file is missing or damaged, or is not one that an export writes.
    """
    folder = contract.check_folder(folder)
    manifest = Manifest.read(folder)
    check_graph_file(folder)
    if (folder / GENAI_CONFIG_FILE).is_file():
        check_genai_config(folder / GENAI_CONFIG_FILE)
    return manifest


def check_graph_file(folder: Path) -> None:
    """Check `model.onnx`, but not the weights beside it.

    Raises:
        ExportError: the file is not a graph, or contains something that no export writes.
    """
    model = _read(folder / MODEL_FILE)
    data = folder / DATA_FILE
    # The Hub's cache links every file into one folder. A link to any other place could be to a private file.
    if data.resolve().parent not in (folder.resolve(), (folder / MODEL_FILE).resolve().parent):
        raise _validation_error(f"{DATA_FILE} is a link to a file elsewhere")
    if model.functions or model.training_info:
        raise _validation_error("It contains functions or training steps of its own")
    if any(entry.key == STORED_OPTIONS for entry in model.metadata_props):
        raise _validation_error("It contains options for ONNX Runtime")
    data_bytes = data.stat().st_size if data.is_file() else 0
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        if graph.sparse_initializer:
            raise _validation_error("It contains sparse weights")
        for tensor in graph.initializer:
            _check_tensor(tensor, data_bytes)
        graphs += _check_nodes(graph.node, data_bytes)


def check_genai_config(file: Path) -> None:
    """Check that a `genai_config.json` names no other files, and has no session options that load a library.

    This package does not read the file, but onnxruntime-genai does.

    Raises:
        ExportError: the file has something that no export writes.
    """
    try:
        config = read_json(file)
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise ExportError(f"{file} is not JSON.", f"{error}.", "Fetch the folder again.") from error
    for place, known in _GENAI_KEYS.items():
        part: Any = config
        for name in place:
            part = part.get(name)
            if not isinstance(part, dict):
                raise _validation_error(f"{GENAI_CONFIG_FILE} has no object {'.'.join(place)}")
        if part.keys() - known:
            raise _validation_error(
                f"{GENAI_CONFIG_FILE} has {', '.join(sorted(part.keys() - known)[:3])}, which no export has"
            )
    decoder = config["model"]["decoder"]
    if decoder.get("filename") != MODEL_FILE:
        raise _validation_error(f"{GENAI_CONFIG_FILE} names a graph other than {MODEL_FILE}")
    # The options of a provider can name libraries. Users who want another provider than the CPU add it themselves.
    if decoder["session_options"].get("provider_options", []) != []:
        raise _validation_error(f"{GENAI_CONFIG_FILE} chooses a provider")


def _read(file: Path) -> ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model: ModelProto = onnx.ModelProto.FromString(read_bytes(file, MAX_GRAPH_BYTES))
    except (DecodeError, ValueError, FileNotFoundError) as error:
        raise ExportError(
            f"{MODEL_FILE} cannot be read.", f"{first_line(error)}.", "Fetch the folder or export it again."
        ) from error
    known = model.ByteSize()
    model.DiscardUnknownFields()
    if model.ByteSize() != known:  # ONNX Runtime may support fields that the installed onnx does not
        raise _validation_error("It has fields that the installed onnx does not know")
    return model


def _check_nodes(nodes: Iterable[NodeProto], data_bytes: int) -> Iterator[GraphProto]:
    """Check each node, and yield the graphs inside the nodes."""
    for node in nodes:
        if node.domain not in DOMAINS:
            raise _validation_error(f"It has operators of {node.domain!r}, which is neither ONNX nor ONNX Runtime")
        if node.op_type in CALLING_OUT:
            raise _validation_error(f"It has the operator {node.op_type}, which can run third-party code")
        for attribute in node.attribute:
            if attribute.sparse_tensors or attribute.HasField("sparse_tensor"):
                raise _validation_error("It contains sparse weights")
            if attribute.HasField("t"):
                _check_tensor(attribute.t, data_bytes)
            for tensor in attribute.tensors:
                _check_tensor(tensor, data_bytes)
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def _check_tensor(tensor: TensorProto, data_bytes: int) -> None:
    """Check that a tensor's numbers are in the graph or its data file.

    Raises:
        ExportError: the amount of numbers does not match type and shape, or they are in a place that is not allowed.
    """
    if tensor.data_type not in _TYPES:
        raise _validation_error(f"{tensor.name or 'A constant'} has a type that no export has")
    bits, field = _TYPES[tensor.data_type]
    if not all(0 <= size <= MAX_SIZE for size in tensor.dims) or tensor.HasField("segment"):
        raise _validation_error(f"The shape of {tensor.name or 'a constant'} is not valid")
    numbers = math.prod(tensor.dims)
    wanted = (numbers * bits + 7) // 8
    if tensor.data_location == _EXTERNAL:
        fits = _fits_in_file(tensor, wanted, data_bytes)
    elif tensor.HasField("raw_data"):
        fits = len(tensor.raw_data) == wanted
    else:  # two 4-bit numbers share an entry
        fits = len(getattr(tensor, field)) == (wanted if bits < 8 else numbers)
    if not fits:
        raise _validation_error(f"The shape of {tensor.name or 'a constant'} does not fit its size in bytes")


def _fits_in_file(tensor: TensorProto, wanted: int, data_bytes: int) -> bool:
    """Return whether the data file has `wanted` bytes at the tensor's place.

    Raises:
        ExportError: the tensor names another file, or has no valid place.
    """
    place = {entry.key: entry.value for entry in tensor.external_data}
    if len(place) != len(tensor.external_data) or place.keys() - set(_PLACE):
        raise _validation_error(f"The place of {tensor.name} in the data file is not valid")
    # Compared exactly, because ONNX Runtime treats a special location as an address in memory.
    if place.get("location") != DATA_FILE:
        raise _validation_error(f"The numbers of {tensor.name} are in a file other than {DATA_FILE}")
    numbers = {name: place.get(name, default) for name, default in (("offset", "0"), ("length", str(wanted)))}
    if not all(text.isascii() and text.isdigit() and len(text) <= _LONGEST_NUMBER for text in numbers.values()):
        raise _validation_error(f"The place of {tensor.name} in the data file is not valid")
    return int(numbers["length"]) == wanted and int(numbers["offset"]) + wanted <= data_bytes


def _validation_error(why: Any) -> ExportError:
    return ExportError(
        "This ONNX folder was not exported by deltamem, or it was changed.",
        f"{why}.",
        "Nothing was loaded from it. Use another folder, or export the adapter yourself.",
    )
