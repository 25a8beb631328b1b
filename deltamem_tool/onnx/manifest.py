"""Write, read and validate `deltamem_onnx.json`, the manifest of an ONNX folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from deltamem_tool.config import MAX_LAYERS, MAX_RANK, MAX_STATE_HEADS
from deltamem_tool.errors import ExportError
from deltamem_tool.io.formats import is_newer, update_command
from deltamem_tool.io.safe_json import parse_json, read_text
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import DTYPES, LOGITS, MANIFEST_FILE, Interface, Layer, disagreement_error

FORMAT = "deltamem-onnx"
FORMAT_VERSION = 4
READABLE_VERSIONS = (3, FORMAT_VERSION)  # 3 had no packed keys and values

MAX_VOCABULARY = 2**22  # the largest known ones have 2**18 tokens
MAX_HEADS = MAX_WIDTH = 2**16  # of keys and values; the largest known ones have 128 heads, 576 wide
MAX_LENGTH = 2**24  # tokens; the longest known contexts have ten million
MAX_SEGMENT = 4 * MAX_STATE_HEADS * MAX_RANK + 1  # `DeltaMemConfig.segment_width` at its largest


@dataclass(frozen=True)
class Quantization:
    """How the weights of the base model are quantised.

    Args:
        bits: bits per weight, 4 or 8.
        group_size: number of weights of one output that share a scale.
        symmetric: whether the range is symmetric around zero. If not, the weights of a group also share an offset.
    """

    bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True)
class Manifest:
    """The content of `deltamem_onnx.json`: what was exported, from what, and how well it agrees with PyTorch.

    Args:
        adapter: fingerprint of the adapter in the graph; memories of other adapters are rejected.
        mechanism: the adapter's `DeltaMemConfig` as a dictionary.
        base_model: where the base model comes from, as passed to the export; None if nothing was passed.
        model_type: model type of the base model.
        target: runtime that the graph is for.
        quantize: how the weights of the base model are quantised; "none" if they are not.
        quantization: the same in detail; None if they are not quantised, and in older folders that do not say.
        interface: inputs and outputs of the graph.
        max_abs_diff: largest difference from PyTorch in float32 over logits and states, measured before the folder was
            written; None if nothing was compared, because no runtime at hand had the graph's operators.
        greedy_agreement: for a quantised graph, the share of PyTorch's greedy tokens that it chose too; else None.
        packages: versions of the packages that made the graph.
    """

    adapter: str
    mechanism: dict[str, Any]
    base_model: str | None
    model_type: str
    target: str
    quantize: str
    quantization: Quantization | None
    interface: Interface
    max_abs_diff: float | None
    greedy_agreement: float | None
    packages: dict[str, str]

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder; see `from_json`."""
        try:
            text = read_text(folder / MANIFEST_FILE)
        except ValueError as error:
            raise disagreement_error(f"It is not valid JSON: {error}") from error
        return cls.from_json(text)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the text of the file, the inverse of `to_json`.

        Raises:
            ExportError: the text is not JSON or has another format or version, or a field is missing or invalid.
        """
        try:
            content = parse_json(text)
        except ValueError as error:
            raise disagreement_error(f"It is not valid JSON: {error}") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise disagreement_error(f"It does not say that its format is {FORMAT!r}")
        version = content.pop("format_version", None)
        if type(version) is not int or version not in READABLE_VERSIONS:
            raise _format_error(version, content.get("packages"))
        values = _fields(cls, content, "the manifest")
        interface = _fields(Interface, values["interface"], "interface")
        _require(interface["logits"] in LOGITS, "interface.logits")
        _require(_is_count(interface["vocab_size"], MAX_VOCABULARY), "interface.vocab_size")
        _require(interface["dtype"] in DTYPES, "interface.dtype")
        for name, longest in (("segment", MAX_SEGMENT), ("max_length", MAX_LENGTH), ("positions", MAX_LENGTH)):
            value = interface[name]
            _require(_is_count(value, longest) or (type(value) is int and value == 0), f"interface.{name}")
        listed = interface["layers"]
        _require(isinstance(listed, list) and 0 < len(listed) <= MAX_LAYERS, "interface.layers")
        for name in ("genai", "packed", "row_by_row"):
            _require(isinstance(interface[name], bool), f"interface.{name}")
        layers = tuple(_layer(layer) for layer in listed)
        for name in ("adapter", "model_type", "target", "quantize"):
            _require(isinstance(values[name], str) and bool(values[name]), name)
        _require(isinstance(values["base_model"], str | None), "base_model")
        for name in ("mechanism", "packages"):
            _require(isinstance(values[name], dict), name)
        for name, most in (("max_abs_diff", math.inf), ("greedy_agreement", 1.0)):
            number = values[name]
            holds = number is None or (
                isinstance(number, int | float) and math.isfinite(number) and 0 <= number <= most
            )
            _require(holds, name)
        values["quantization"] = _quantization(values["quantization"])
        return cls(**{**values, "interface": Interface(**{**interface, "layers": layers})})


# Upper bounds of all sizes.
_LAYER_SIZES = {
    "key": (MAX_HEADS, MAX_WIDTH),
    "value": (MAX_HEADS, MAX_WIDTH),
    "ngrams": (MAX_WIDTH,) * 3,
    "state": (MAX_STATE_HEADS, MAX_RANK, MAX_RANK),
}
_CONVOLUTION_SIZES = (MAX_WIDTH, MAX_WIDTH)
MAX_RECURRENT_AXES = 3
MAX_CONVOLUTIONS = 8  # of one layer; known models have up to four


def _layer(content: Any) -> Layer:
    layer = _fields(Layer, content, "layers")
    sizes = {part: _sizes(layer[part], most, f"layers.{part}") for part, most in _LAYER_SIZES.items()}
    _require((sizes["key"] is None) == (sizes["value"] is None), "layers.value")
    _require(sizes["state"] is None or sizes["state"][1] == sizes["state"][2], "layers.state")
    convolutions = layer["convolutions"]
    _require(isinstance(convolutions, list) and len(convolutions) <= MAX_CONVOLUTIONS, "layers.convolutions")
    of_each = [_sizes(one, _CONVOLUTION_SIZES, "layers.convolutions") for one in convolutions]
    _require(None not in of_each, "layers.convolutions")
    recurrent = layer["recurrent"]
    axes = len(recurrent) if isinstance(recurrent, list) else 0
    _require(recurrent is None or 0 < axes <= MAX_RECURRENT_AXES, "layers.recurrent")
    recurrent = _sizes(recurrent, (MAX_WIDTH,) * axes, "layers.recurrent")
    return Layer(**sizes, convolutions=tuple(of_each), recurrent=recurrent, columns=_columns(layer["columns"]))


def _columns(content: Any) -> tuple[tuple[str, int], ...]:
    _require(isinstance(content, list), "layers.columns")
    for one in content:
        is_pair = isinstance(one, list) and len(one) == 2
        _require(is_pair and one[0] in contract.COLUMNS and _is_count(one[1], MAX_WIDTH), "layers.columns")
    return tuple((part, width) for part, width in content)


def _sizes(content: Any, most: tuple[int, ...], name: str) -> Any:
    """Return `content` as a tuple of sizes, as many as `most` has and each at most that of `most`; None stays None."""
    if content is None:
        return None
    _require(isinstance(content, list) and len(content) == len(most) and all(map(_is_count, content, most)), name)
    return tuple(content)


def _quantization(content: Any) -> Quantization | None:
    if content is None:
        return None
    values = _fields(Quantization, content, "quantization")
    for name in ("bits", "group_size"):
        _require(_is_count(values[name], MAX_WIDTH), f"quantization.{name}")
    _require(isinstance(values["symmetric"], bool), "quantization.symmetric")
    return Quantization(**values)


# Values for fields that older folders lack.
_ADDED: dict[str, Any] = {
    **{"positions": 0, "packed": False, "quantization": None, "row_by_row": False},
    **{"convolutions": [], "recurrent": None, "columns": [], "ngrams": None},
}


def _fields(cls: type, content: Any, where: str) -> dict[str, Any]:
    """Return the fields of `cls` in `content`. Others, which a later release may add to the format, are ignored."""
    if not isinstance(content, dict):
        raise disagreement_error(f"{where} is not a JSON object")
    names = [field.name for field in fields(cls)]
    content = {**_ADDED, **content}
    missing = [name for name in names if name not in content]
    if missing:
        raise disagreement_error(f"In {where}, these fields are missing: {', '.join(missing)}")
    return {name: content[name] for name in names}


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise disagreement_error(f"Its value for {name} is not valid")


def _format_error(version: Any, packages: Any) -> ExportError:
    """Return the error for a folder of another format version, written by `packages`."""
    written_by = packages.get("deltamem-tool") if isinstance(packages, dict) else None
    return ExportError(
        f"This ONNX folder has format {version}.",
        f"This version of deltamem reads format {FORMAT_VERSION}.",
        f"Update deltamem-tool: {update_command(written_by)}"
        if is_newer(version, FORMAT_VERSION)
        else "Export the adapter again.",
    )
