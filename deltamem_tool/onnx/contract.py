"""What an ONNX folder holds and what its graph takes and gives: every name, type, shape and file, spelled here alone.

Shapes: B conversations, P past tokens, T tokens of this call, V vocabulary, H state heads of rank R.

| input                                          | type    | shape                     |
| `input_ids`                                    | int64   | [B, T]                    |
| `attention_mask` (1 text, 0 padding)           | int64   | [B, P + T]                |
| `write_mask` (which tokens write)              | bool    | [B, T]                    |
| `segment_end` (tokens that end a segment)      | bool    | [B, T]                    |
| `past_key_values.{i}.key`, `.value`            | dtype   | [B, kv_heads, P, width]   |
| `past_key_values.{i}.recurrent_state`          | float32 | [B, H, R, R]              |
| `past_key_values.{i}.segment`                  | float32 | [B, W]                    |

| output                                         | type    | shape                         |
| `logits` (at the last position, or at all)     | float32 | [B, 1, V] or [B, T, V]        |
| `present.{i}.key`, `.value`                    | dtype   | [B, kv_heads, P + T, width]   |
| `present.{i}.recurrent_state`                  | float32 | [B, H, R, R]                  |
| `present.{i}.segment`                          | float32 | [B, W]                        |

Where the adapter writes by segments (messages, sentences), `write_mask` says which tokens belong to one, and each is
written at its end; `segment` holds what the open one has gathered, its number of tokens last. Where every token writes,
there is neither `segment_end` nor `segment`.

A graph for onnxruntime-genai has what that package feeds, and no more. It marks no tokens, so there is no `write_mask`:
every token writes. It finds a layer's state by a `past_key_values.{i}.conv_state`, float32 [B, 1, 1], that goes through
to `present.{i}.conv_state`. And it begins with zeros, so where the past holds no tokens the state is that of an input
which has a default and can be set by an adapter file of ONNX Runtime: `initial.{i}.recurrent_state`, float32
[1, H, R, R]. It pads on the right: the last logits are those of each row's last valid token, packed or not.

Keys and values are packed (`Interface.packed`) where attention is ONNX Runtime's `GroupQueryAttention`:

* Each row's valid tokens take the first columns of its keys and values, in order, wherever the mask has its padding: on
  the left, on the right or between. What lies behind them is not read.
* They may be longer than the text. A past of exactly P columns comes back with P + T. One of N columns, where N is at
  least P + T, comes back with N, and may be one tensor on both sides: new tokens are written in place.
* The last logits are those of each row's last valid token in the call.
* Several rows take several tokens in their first call, and one in every later one. `runtime.buffered_graph` feeds rows
  one by one where a call has more.

Elsewhere a column of keys and values belongs to a column of the mask, and the last logits to its last column.

A graph of fixed length (`Interface.max_length` is N, not 0) takes and gives keys and values of N columns: room for so
many tokens, which may be one tensor on both sides. Then

| `attention_mask` (1 text, 0 padding or nothing yet)        | int64   | [B, N]                  |
| `past_length` (how many columns of the mask are taken)     | int64   | [1]                     |
| `past_key_values.{i}.key`, `.value`, `present.{i}.…`       | dtype   | [B, kv_heads, N, width] |

and the columns of the mask from `past_length` on are those of the call's tokens. Packed keys and values take several
rows with one token only. Others go into the columns of the mask, and what later columns hold must be finite numbers.

Positions are counted in the attention mask, so padding takes none (save in models that take no positions, such as
BART's decoder, which count columns). Heads and width of keys and of values are each layer's own. Layers without a
memory have no `recurrent_state`; layers that read another one's keys have no `key` and `value`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from deltamem_tool.config import MAX_LAYERS, MAX_RANK, MAX_STATE_HEADS
from deltamem_tool.errors import ExportError
from deltamem_tool.io.formats import (
    CHAT_TEMPLATE_FILE,
    MODEL_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    is_newer,
    update_command,
)
from deltamem_tool.io.names import expand_user
from deltamem_tool.io.safe_json import parse_json, read_text

FORMAT = "deltamem-onnx"
FORMAT_VERSION = 4
READABLE_VERSIONS = (3, FORMAT_VERSION)  # 3 had no packed keys and values

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
MANIFEST_FILE = "deltamem_onnx.json"
GENERATION_CONFIG_FILE = "generation_config.json"
GENAI_CONFIG_FILE = "genai_config.json"
# All that an export writes, and all that is sent to the Hub or fetched from it.
FILES = (
    MODEL_FILE,
    DATA_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    GENAI_CONFIG_FILE,
    MODEL_CONFIG_FILE,
)
REQUIRED_FILES = (
    MODEL_FILE,
    DATA_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,  # without it, transformers guesses another tokenizer
    GENERATION_CONFIG_FILE,
)

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
WRITE_MASK = "write_mask"
PAST_LENGTH = "past_length"
SEGMENT_END = "segment_end"
PAST = "past_key_values"
LOGITS_OUTPUT = "logits"
PRESENT = "present"
INITIAL = "initial"
KEY, VALUE, STATE, SEGMENT, CONV = "key", "value", "recurrent_state", "segment", "conv_state"

MIN_LENGTH = 64  # of keys and values of a fixed length: what is compared with PyTorch before a folder appears
LOGITS = ("last", "all")  # the last position's alone, or every position's

INT64, BOOL, FLOAT32, FLOAT16, BFLOAT16 = "int64", "bool", "float32", "float16", "bfloat16"
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)  # of keys and values
# Axes that vary, by the names of the ecosystem. No runtime looks at them: folders with other names stay readable.
BATCH, TOKENS = "batch_size", "sequence_length"
PAST_TOKENS, ALL_TOKENS = "past_sequence_length", "total_sequence_length"
Shape = tuple[int | str, ...]

MAX_VOCABULARY = 2**22  # the largest are of 2**18
MAX_HEADS = MAX_WIDTH = 2**16  # of keys and values; the largest are of 128 heads, 576 wide
MAX_LENGTH = 2**24  # tokens; the longest contexts are of ten million
MAX_SEGMENT = 4 * MAX_STATE_HEADS * MAX_RANK + 1  # `DeltaMemConfig.segment_width` at its largest


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Args:
        key: number of heads and width of its keys; None where it keeps none.
        value: the same of its values.
        state: `(H, R, R)` of its memory; None where it has none.
    """

    key: tuple[int, int] | None
    value: tuple[int, int] | None
    state: tuple[int, int, int] | None

    @property
    def cache(self) -> dict[str, tuple[int, int]]:
        """(heads, width) of what its cache holds, by part."""
        parts = {KEY: self.key, VALUE: self.value}
        return {part: size for part, size in parts.items() if size is not None}


@dataclass(frozen=True)
class Interface:
    """What the graph takes and gives.

    Args:
        logits: "last" or "all".
        vocab_size: V.
        dtype: of keys and values.
        segment: W, numbers that a layer keeps of an open segment; 0 where every token writes.
        layers: one entry a decoder layer.
        genai: whether onnxruntime-genai feeds it.
        max_length: N, columns of keys and values, where they are of a fixed length; 0 where they grow.
        positions: how many tokens the model has positions for; 0 for any number, and where an older folder is silent.
        packed: whether each row's keys and values lie at the front of their buffer, without padding; see above.
    """

    logits: str
    vocab_size: int
    dtype: str
    segment: int
    layers: tuple[Layer, ...]
    genai: bool = False
    max_length: int = 0
    positions: int = 0
    packed: bool = False

    @property
    def room(self) -> int | None:
        """The most tokens of a conversation's context; None for any number."""
        return min((length for length in (self.max_length, self.positions) if length), default=None)

    @property
    def state_shapes(self) -> dict[int, tuple[int, int, int]]:
        """`(H, R, R)` by layer index."""
        return {i: layer.state for i, layer in enumerate(self.layers) if layer.state is not None}

    @property
    def memory_bytes(self) -> int:
        """Of one conversation: its states and open segments, float32."""
        return sum(4 * (math.prod(shape) + self.segment) for shape in self.state_shapes.values())

    def inputs(self) -> dict[str, tuple[str, Shape]]:
        """(type, shape) of every input that has no default, by name, in the graph's order."""
        return {
            INPUT_IDS: (INT64, (BATCH, TOKENS)),
            ATTENTION_MASK: (INT64, (BATCH, self.max_length or ALL_TOKENS)),
            **({} if self.genai else {WRITE_MASK: (BOOL, (BATCH, TOKENS))}),
            **({PAST_LENGTH: (INT64, (1,))} if self.max_length else {}),
            **({SEGMENT_END: (BOOL, (BATCH, TOKENS))} if self.segment else {}),
            **self._carried(PAST, self.max_length or PAST_TOKENS),
        }

    def defaults(self) -> dict[str, tuple[str, Shape]]:
        """(type, shape) of every input that has a default, by name."""
        states = self.state_shapes if self.genai else {}
        return {carried_name(INITIAL, i, STATE): (FLOAT32, (1, *state)) for i, state in states.items()}

    def outputs(self) -> dict[str, tuple[str, Shape]]:
        """(type, shape) of every output by name, in the graph's order."""
        positions = 1 if self.logits == "last" else TOKENS
        return {
            LOGITS_OUTPUT: (FLOAT32, (BATCH, positions, self.vocab_size)),
            **self._carried(PRESENT, self.max_length or ALL_TOKENS),
        }

    def _carried(self, prefix: str, length: int | str) -> dict[str, tuple[str, Shape]]:
        """What goes from call to call."""
        tensors: dict[str, tuple[str, Shape]] = {}
        for i, layer in enumerate(self.layers):
            for part, (heads, width) in layer.cache.items():
                tensors[carried_name(prefix, i, part)] = (self.dtype, (BATCH, heads, length, width))
            if layer.state is not None:
                tensors[carried_name(prefix, i, STATE)] = (FLOAT32, (BATCH, *layer.state))
                if self.segment:
                    tensors[carried_name(prefix, i, SEGMENT)] = (FLOAT32, (BATCH, self.segment))
                if self.genai:
                    tensors[carried_name(prefix, i, CONV)] = (FLOAT32, (BATCH, 1, 1))
        return tensors

    def check_graph(
        self,
        inputs: Mapping[str, tuple[str, list[Any]]],
        outputs: Mapping[str, tuple[str, list[Any]]],
        defaults: Mapping[str, tuple[str, list[Any]]],
    ) -> None:
        """Check what a loaded graph reports of its inputs, its outputs, and its inputs that have a default.

        Each is a type and a shape by name; a dimension that is not an integer varies.

        Raises:
            ExportError: a name, a type or a fixed dimension differs.
        """
        for kind, expected, actual in (
            ("input", self.inputs(), inputs),
            ("output", self.outputs(), outputs),
            ("input with a default", self.defaults(), defaults),
        ):
            wrong = [f"no {kind} {name!r}" for name in expected if name not in actual]
            wrong += [f"an unexpected {kind} {name!r}" for name in actual if name not in expected]
            for name in expected.keys() & actual.keys():
                if not _fits(expected[name], actual[name]):
                    wrong.append(f"the {kind} {name!r} is {actual[name]}, not {expected[name]}")
            if wrong:
                raise _disagreement(f"The graph has {'; '.join(sorted(wrong)[:3])}")


@dataclass(frozen=True)
class Quantization:
    """How the base's weights are quantised.

    Args:
        bits: 4 or 8 a weight.
        group_size: so many weights of one output share a scale.
        symmetric: whether their range has its zero in the middle; else they share a zero point too.
    """

    bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True)
class Manifest:
    """`deltamem_onnx.json`: what was exported, from what, and how well it agreed.

    Args:
        adapter: fingerprint of the adapter in the graph; memories of another one are refused.
        mechanism: the adapter's `DeltaMemConfig` as a dictionary.
        base_model: where the base came from, as the exporter was told; None if it was not.
        model_type: the base's architecture.
        target: what kind of runtime the graph is for.
        quantize: how the base's weights are quantised; "none" if they are not.
        quantization: the same in detail; None if they are not, and where an older folder is silent.
        interface: what the graph takes and gives.
        max_abs_diff: largest difference from PyTorch in float32 over logits and states, measured before the folder was
            written; None if nothing was compared, because no runtime at hand had the graph's operators.
        greedy_agreement: of a quantised graph, the share of PyTorch's greedy tokens that it chose too; else None.
        packages: versions that made the graph.
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
        """The text of the file."""
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder, as `from_json`."""
        try:
            text = read_text(folder / MANIFEST_FILE)
        except ValueError as error:
            raise _disagreement(f"It is not valid JSON: {error}") from error
        return cls.from_json(text)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the text of the file, the inverse of `to_json`.

        Raises:
            ExportError: the text is not JSON or of another format or version, or a field is missing or invalid.
        """
        try:
            content = parse_json(text)
        except ValueError as error:
            raise _disagreement(f"It is not valid JSON: {error}") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise _disagreement(f"It does not say that its format is {FORMAT!r}")
        version = content.pop("format_version", None)
        if type(version) is not int or version not in READABLE_VERSIONS:
            raise _of_format(version, content.get("packages"))
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
        for name in ("genai", "packed"):
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


def carried_name(prefix: str, layer: int, part: str) -> str:
    """Name a carried tensor: `past_key_values.0.key`, `present.3.recurrent_state`."""
    return f"{prefix}.{layer}.{part}"


def past_name(present: str) -> str:
    """The input that takes the output `present` at the next call."""
    return PAST + present.removeprefix(PRESENT)


def check_folder(folder: str | Path) -> Path:
    """Check that a folder has every file that is required.

    Raises:
        ExportError: there is no such folder, or a file is missing.
    """
    folder = expand_user(folder)
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        why = f"It lacks {', '.join(missing)}." if folder.is_dir() else "There is no such folder."
        raise ExportError(f"{folder} is not an ONNX folder.", why, "Make one with `deltamem export ADAPTER --out DIR`.")
    return folder


# What each number may be at most.
_LAYER_SIZES = {
    "key": (MAX_HEADS, MAX_WIDTH),
    "value": (MAX_HEADS, MAX_WIDTH),
    "state": (MAX_STATE_HEADS, MAX_RANK, MAX_RANK),
}


def _layer(content: Any) -> Layer:
    layer = _fields(Layer, content, "layers")
    sizes = {part: _sizes(layer[part], most, f"layers.{part}") for part, most in _LAYER_SIZES.items()}
    _require((sizes["key"] is None) == (sizes["value"] is None), "layers.value")
    _require(sizes["state"] is None or sizes["state"][1] == sizes["state"][2], "layers.state")
    return Layer(**sizes)


def _sizes(content: Any, most: tuple[int, ...], name: str) -> Any:
    """`content` as a tuple of as many sizes as `most` has, none above its own; None stays None."""
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


_ADDED = {"positions": 0, "packed": False, "quantization": None}  # what older folders do not have


def _fields(cls: type, content: Any, where: str) -> dict[str, Any]:
    """The fields of `cls` in `content`; others, which a later release may add within one format, are ignored."""
    if not isinstance(content, dict):
        raise _disagreement(f"{where} is not a JSON object")
    names = [field.name for field in fields(cls)]
    content = {**_ADDED, **content}
    missing = [name for name in names if name not in content]
    if missing:
        raise _disagreement(f"In {where}, these fields are missing: {', '.join(missing)}")
    return {name: content[name] for name in names}


def _fits(expected: tuple[str, Shape], actual: tuple[str, list[Any]]) -> bool:
    """One type, one rank, and every number of `expected`; an axis that varies must not be fixed."""
    (dtype, shape), (graph_dtype, graph_shape) = expected, actual
    if dtype != graph_dtype or len(shape) != len(graph_shape):
        return False
    for size, graph_size in zip(shape, graph_shape, strict=True):
        if isinstance(size, int) != isinstance(graph_size, int) or (isinstance(size, int) and size != graph_size):
            return False
    return True


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise _disagreement(f"Its value for {name} is not valid")


def _of_format(version: Any, packages: Any) -> ExportError:
    """The error for a folder of another format version, written by `packages`."""
    written_by = packages.get("deltamem-tool") if isinstance(packages, dict) else None
    return ExportError(
        f"This ONNX folder is of format {version}.",
        f"This version of deltamem reads format {FORMAT_VERSION}.",
        f"Update deltamem-tool: {update_command(written_by)}"
        if is_newer(version, FORMAT_VERSION)
        else "Export the adapter again.",
    )


def _disagreement(why: str) -> ExportError:
    return ExportError(f"{MANIFEST_FILE} and this version or the graph disagree.", f"{why}.", "Export the model again.")
