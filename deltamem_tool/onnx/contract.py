"""The interface of an ONNX folder: its files, and the names, types and shapes of all inputs and outputs of its graph.

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

| `past_key_values.{i}.indexer_key`              | dtype   | [B, 1, P, width]              |
| `present.{i}.indexer_key`                      | dtype   | [B, 1, P + T, width]          |

are the keys of an indexer, in layers that use one to choose the tokens that attention sees. `.compressor_kv`,
`.compressor_gate`, `.indexer_kv` and `.indexer_gate` are the inputs of DeepSeek-V4's compression (`Layer.columns`). All
of these belong to the base model. They have a column for every token, as keys and values do, and are treated alike.

| `past_key_values.{i}.conv_state`               | float32 | [B, channels, kernel − 1] |
| `past_key_values.{i}.recurrent_state`, or      | float32 | [B, …]                    |
| `.ssm_state` in a layer with a memory          |         |                           |

and `present.{i}.…` of each, are states of the base model, in layers that have convolutions or linear attention besides
attention or instead of it (`Layer.convolutions`, `Layer.recurrent`). They are the last inputs of a convolution (the
second convolution of a layer has `conv_state_1`, and so on), and a recurrent state. Memory files do not contain them,
and a conversation begins with zeros. `.ple_conv_state` `[B, channels, columns]` and `.ple_tokens` `[B, tokens]` (ids in
float32) belong to n-gram embeddings (`Layer.ngrams`). In a layer without a memory, `recurrent_state` may be that of the
base model; in a layer with a memory, it is the memory's. Padding changes none of these states, wherever it is.

If the adapter writes by segments (messages or sentences), `write_mask` marks the tokens that belong to a segment, and
each segment is written at its end. `segment` holds the sums of the open segment, then its number of tokens. If every
token writes, there is neither `segment_end` nor `segment`.

A graph for onnxruntime-genai has only the inputs that this package feeds. It marks no tokens, so there is no
`write_mask`, and every token writes. It finds the state of a layer by a `past_key_values.{i}.conv_state`, float32
[B, 1, 1], which is passed through to `present.{i}.conv_state`. It begins with zeros; so if the past holds no tokens,
the state is taken from the input `initial.{i}.recurrent_state`, float32 [1, H, R, R], which has a default and can be
set by an adapter file of ONNX Runtime. It pads on the right, so the last logits are those of each row's last valid
token, packed or not.

Keys and values are packed (`Interface.packed`) if attention is ONNX Runtime's `GroupQueryAttention`:

* The valid tokens of each row take the first columns of its keys and values, in order, wherever the mask has its
  padding: on the left, on the right or in between. Columns behind them are not read.
* Keys and values may be longer than the text. A past of exactly P columns is returned with P + T columns. A past of N
  columns, with N at least P + T, is returned with N columns. Input and output may then be the same tensor: new tokens
  are written in place.
* The last logits are those of each row's last valid token in the call.
* Several rows accept several tokens in their first call, and one token in every later call. If a call has more,
  `runtime.buffered_graph` feeds the rows one by one.

Otherwise, a column of keys and values corresponds to a column of the mask, and the last logits to its last column. If
the base model uses columns as positions (`Interface.row_by_row`), padding would count, so `runtime.rows_graph` feeds
each row in calls of its own.

A graph of fixed length (`Interface.max_length` is N, not 0) takes and returns keys and values with N columns, enough
for N tokens. Input and output may be the same tensor. Then

| `attention_mask` (1 text, 0 padding or nothing yet)        | int64   | [B, N]                  |
| `past_length` (how many columns of the mask are taken)     | int64   | [1]                     |
| `past_key_values.{i}.key`, `.value`, `present.{i}.…`       | dtype   | [B, kv_heads, N, width] |

and the columns of the mask from `past_length` on are those of the call's tokens. Packed keys and values accept several
rows only with one token each. Keys and values that are not packed go into the columns of the mask, and later columns
must hold finite numbers.

Positions are counted in the attention mask, so padding takes no position. Models that take no positions, such as BART's
decoder, are an exception: they count columns. The number of heads and the width of keys and values can differ by layer.
Layers without a memory have no `recurrent_state`; layers that read the keys of another layer have no `key` and `value`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamem_tool.errors import ExportError
from deltamem_tool.io.formats import (
    CHAT_TEMPLATE_FILE,
    MODEL_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from deltamem_tool.io.names import expand_user

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
MANIFEST_FILE = "deltamem_onnx.json"
GENERATION_CONFIG_FILE = "generation_config.json"
GENAI_CONFIG_FILE = "genai_config.json"
# All files that an export writes, and that are sent to the Hub or fetched from it.
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
INDEXER_KEY = "indexer_key"
# Values that a base model may keep for every token besides keys and values.
COLUMNS = (INDEXER_KEY, "compressor_kv", "compressor_gate", "indexer_kv", "indexer_gate")
CACHE = (KEY, VALUE, *COLUMNS)  # parts with one column per token
PLE_CONV, PLE_TOKENS = "ple_conv_state", "ple_tokens"
SSM = "ssm_state"  # name of the base model's state in a layer whose STATE is a memory

MIN_LENGTH = 64  # of keys and values of a fixed length, which must fit the conversation that is compared with PyTorch
LOGITS = ("last", "all")  # logits of the last position only, or of every position

INT64, BOOL, FLOAT32, FLOAT16, BFLOAT16 = "int64", "bool", "float32", "float16", "bfloat16"
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)  # of keys and values
# Dynamic axes, with the names of the ecosystem. No runtime uses the names, so folders with other names work too.
BATCH, TOKENS = "batch_size", "sequence_length"
PAST_TOKENS, ALL_TOKENS = "past_sequence_length", "total_sequence_length"
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Args:
        key: number of heads and width of its keys; None if it keeps none.
        value: number of heads and width of its values; None if it keeps none.
        state: `(H, R, R)` of its memory; None if it has none.
        convolutions: `(channels, kernel − 1)` of the state of each convolution of the base model.
        recurrent: sizes of the recurrent state of the base model; None if it has none.
        columns: name and width of further values that it keeps for every token.
        ngrams: `(channels, columns)` of the state of a convolution of n-gram embeddings, and the number of tokens that
            these look back at; None if it has none.
    """

    key: tuple[int, int] | None
    value: tuple[int, int] | None
    state: tuple[int, int, int] | None
    convolutions: tuple[tuple[int, int], ...] = ()
    recurrent: tuple[int, ...] | None = None
    columns: tuple[tuple[str, int], ...] = ()
    ngrams: tuple[int, int, int] | None = None

    @property
    def cache(self) -> dict[str, tuple[int, int]]:
        """(heads, width) of each part of its cache."""
        parts = {KEY: self.key, VALUE: self.value}
        held = {part: size for part, size in parts.items() if size is not None}
        return held | {part: (1, width) for part, width in self.columns}

    @property
    def base_states(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the base model's states, by part."""
        parts: dict[str, tuple[int, ...]] = {
            f"{CONV}_{number}" if number else CONV: sizes for number, sizes in enumerate(self.convolutions)
        }
        if self.ngrams is not None:
            parts |= {PLE_CONV: self.ngrams[:2], PLE_TOKENS: self.ngrams[2:]}
        return parts if self.recurrent is None else {**parts, self.recurrent_part: self.recurrent}

    @property
    def recurrent_part(self) -> str:
        """Name of the base model's recurrent state."""
        return STATE if self.state is None else SSM


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of a graph.

    Args:
        logits: "last" or "all".
        vocab_size: V.
        dtype: data type of keys and values.
        segment: W, the number of values that a layer keeps of an open segment; 0 if every token writes.
        layers: one entry per decoder layer.
        genai: whether the graph is for onnxruntime-genai.
        max_length: N, the number of columns of keys and values with a fixed length; 0 if they grow.
        positions: maximum number of positions of the model; 0 for no limit, and in older folders that do not say.
        packed: whether the keys and values of each row are at the front of their buffer, without padding; see above.
        row_by_row: whether each row is fed by itself, without padding, because the base uses columns as positions.
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
    row_by_row: bool = False

    @property
    def room(self) -> int | None:
        """Maximum number of tokens in a conversation's context; None if there is no limit."""
        return min((length for length in (self.max_length, self.positions) if length), default=None)

    @property
    def state_shapes(self) -> dict[int, tuple[int, int, int]]:
        """`(H, R, R)` by layer index."""
        return {i: layer.state for i, layer in enumerate(self.layers) if layer.state is not None}

    @property
    def base_states(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the base model's states, by input name; empty if layers keep only keys and values."""
        return {
            carried_name(PAST, i, part): sizes
            for i, layer in enumerate(self.layers)
            for part, sizes in layer.base_states.items()
        }

    @property
    def memory_bytes(self) -> int:
        """Size in bytes of one conversation's states and open segments, float32."""
        return sum(4 * (math.prod(shape) + self.segment) for shape in self.state_shapes.values())

    def inputs(self) -> dict[str, tuple[str, Shape]]:
        """(type, shape) of every input that has no default, by name, in the graph's order."""
        return {
            INPUT_IDS: (INT64, (BATCH, TOKENS)),
            ATTENTION_MASK: (INT64, (BATCH, self.max_length or ALL_TOKENS)),
            **({} if self.genai else {WRITE_MASK: (BOOL, (BATCH, TOKENS))}),
            **({PAST_LENGTH: (INT64, (1,))} if self.max_length else {}),
            **({SEGMENT_END: (BOOL, (BATCH, TOKENS))} if self.segment else {}),
            **self._carried_tensors(PAST, self.max_length or PAST_TOKENS),
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
            **self._carried_tensors(PRESENT, self.max_length or ALL_TOKENS),
        }

    def _carried_tensors(self, prefix: str, length: int | str) -> dict[str, tuple[str, Shape]]:
        """Return the tensors that are carried from call to call, with names that start with `prefix`."""
        tensors: dict[str, tuple[str, Shape]] = {}
        for i, layer in enumerate(self.layers):
            for part, (heads, width) in layer.cache.items():
                tensors[carried_name(prefix, i, part)] = (self.dtype, (BATCH, heads, length, width))
            for part, sizes in layer.base_states.items():
                tensors[carried_name(prefix, i, part)] = (FLOAT32, (BATCH, *sizes))
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
                raise disagreement_error(f"The graph has {'; '.join(sorted(wrong)[:3])}")


def carried_name(prefix: str, layer: int, part: str) -> str:
    """Return the name of a carried tensor, such as `past_key_values.0.key` or `present.3.recurrent_state`."""
    return f"{prefix}.{layer}.{part}"


def past_name(present: str) -> str:
    """Return the input of the next call that takes the output `present`."""
    return PAST + present.removeprefix(PRESENT)


def check_folder(folder: str | Path) -> Path:
    """Check that an ONNX folder has all required files.

    Raises:
        ExportError: there is no such folder, or a file is missing.
    """
    folder = expand_user(folder)
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        why = f"It lacks {', '.join(missing)}." if folder.is_dir() else "There is no such folder."
        next = "Create one with `deltamem export ADAPTER --out DIR`."
        raise ExportError(f"{folder} is not an ONNX folder.", why, next)
    return folder


def _fits(expected: tuple[str, Shape], actual: tuple[str, list[Any]]) -> bool:
    """Return whether type, rank and fixed sizes are equal. A dynamic axis of `expected` must not be fixed."""
    (dtype, shape), (graph_dtype, graph_shape) = expected, actual
    if dtype != graph_dtype or len(shape) != len(graph_shape):
        return False
    for size, graph_size in zip(shape, graph_shape, strict=True):
        if isinstance(size, int) != isinstance(graph_size, int) or (isinstance(size, int) and size != graph_size):
            return False
    return True


def disagreement_error(why: str) -> ExportError:
    """Return the error for a manifest that does not match the graph or this version."""
    return ExportError(
        f"{MANIFEST_FILE} does not match the graph or this version of deltamem.", f"{why}.", "Export the model again."
    )
