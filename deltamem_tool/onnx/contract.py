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

| `past_key_values.{i}.indexer_key`              | dtype   | [B, 1, P, width]              |
| `present.{i}.indexer_key`                      | dtype   | [B, 1, P + T, width]          |

are the keys of an indexer, in layers that have one to choose which tokens attention sees; `.compressor_kv`,
`.compressor_gate`, `.indexer_kv` and `.indexer_gate` are what DeepSeek-V4 compresses (`Layer.columns`). They are the
base's, have a column for every token as keys and values have, and are treated as these are.

| `past_key_values.{i}.conv_state`               | float32 | [B, channels, kernel − 1] |
| `past_key_values.{i}.recurrent_state`, or      | float32 | [B, …]                    |
| `.ssm_state` in a layer with a memory          |         |                           |

and `present.{i}.…` of each, are states of the base's own, in layers that have convolutions or linear attention beside
attention or instead of it (`Layer.convolutions`, `Layer.recurrent`): the last inputs of a convolution (a layer's second
is `conv_state_1`, and so on), and a recurrent state. No memory file holds them, and a conversation begins with zeros.
`.ple_conv_state` `[B, channels, columns]` and `.ple_tokens` `[B, tokens]`, ids in float32, are of embeddings of n-grams
(`Layer.ngrams`). A layer without a memory may have a `recurrent_state` of the base; one with a memory has ours under
that name. Padding changes none of them, wherever it is.

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

Elsewhere a column of keys and values belongs to a column of the mask, and the last logits to its last column. Where the
base itself takes columns for positions (`Interface.row_by_row`), padding would count: `runtime.rows_graph` feeds each
row in calls of its own.

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
INDEXER_KEY = "indexer_key"
# What a base may keep of every token beside keys and values.
COLUMNS = (INDEXER_KEY, "compressor_kv", "compressor_gate", "indexer_kv", "indexer_gate")
CACHE = (KEY, VALUE, *COLUMNS)  # what has a column for every token
PLE_CONV, PLE_TOKENS = "ple_conv_state", "ple_tokens"
SSM = "ssm_state"  # what STATE is of the base, in a layer whose STATE is a memory

MIN_LENGTH = 64  # of keys and values of a fixed length: what is compared with PyTorch before a folder appears
LOGITS = ("last", "all")  # the last position's alone, or every position's

INT64, BOOL, FLOAT32, FLOAT16, BFLOAT16 = "int64", "bool", "float32", "float16", "bfloat16"
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)  # of keys and values
# Axes that vary, by the names of the ecosystem. No runtime looks at them: folders with other names stay readable.
BATCH, TOKENS = "batch_size", "sequence_length"
PAST_TOKENS, ALL_TOKENS = "past_sequence_length", "total_sequence_length"
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Args:
        key: number of heads and width of its keys; None where it keeps none.
        value: the same of its values.
        state: `(H, R, R)` of its memory; None where it has none.
        convolutions: `(channels, kernel − 1)` of what each of the base's own convolutions keeps.
        recurrent: sizes of the base's own recurrent state; None where it has none.
        columns: part and width of what else it keeps of every token.
        ngrams: `(channels, columns)` of what a convolution of embeddings of n-grams keeps, and how many tokens they
            look back at; None where it has none.
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
        """(heads, width) of what its cache holds, by part."""
        parts = {KEY: self.key, VALUE: self.value}
        held = {part: size for part, size in parts.items() if size is not None}
        return held | {part: (1, width) for part, width in self.columns}

    @property
    def base_states(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the base's own states, by part."""
        parts: dict[str, tuple[int, ...]] = {
            f"{CONV}_{number}" if number else CONV: sizes for number, sizes in enumerate(self.convolutions)
        }
        if self.ngrams is not None:
            parts |= {PLE_CONV: self.ngrams[:2], PLE_TOKENS: self.ngrams[2:]}
        return parts if self.recurrent is None else {**parts, self.recurrent_part: self.recurrent}

    @property
    def recurrent_part(self) -> str:
        """What its own recurrent state is called."""
        return STATE if self.state is None else SSM


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
        row_by_row: whether each row is fed by itself, without padding: the base takes columns for positions.
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
        """The most tokens of a conversation's context; None for any number."""
        return min((length for length in (self.max_length, self.positions) if length), default=None)

    @property
    def state_shapes(self) -> dict[int, tuple[int, int, int]]:
        """`(H, R, R)` by layer index."""
        return {i: layer.state for i, layer in enumerate(self.layers) if layer.state is not None}

    @property
    def base_states(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the base's own states, by the name of the input; empty where layers keep keys and values alone."""
        return {
            carried_name(PAST, i, part): sizes
            for i, layer in enumerate(self.layers)
            for part, sizes in layer.base_states.items()
        }

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
                raise disagreement(f"The graph has {'; '.join(sorted(wrong)[:3])}")


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


def _fits(expected: tuple[str, Shape], actual: tuple[str, list[Any]]) -> bool:
    """One type, one rank, and every number of `expected`; an axis that varies must not be fixed."""
    (dtype, shape), (graph_dtype, graph_shape) = expected, actual
    if dtype != graph_dtype or len(shape) != len(graph_shape):
        return False
    for size, graph_size in zip(shape, graph_shape, strict=True):
        if isinstance(size, int) != isinstance(graph_size, int) or (isinstance(size, int) and size != graph_size):
            return False
    return True


def disagreement(why: str) -> ExportError:
    """The error for a manifest that this version or the graph does not agree with."""
    return ExportError(f"{MANIFEST_FILE} and this version or the graph disagree.", f"{why}.", "Export the model again.")
