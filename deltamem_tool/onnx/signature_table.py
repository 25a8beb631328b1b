"""Describe the inputs and outputs of a graph in a table, for one ONNX folder or for the documentation."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import groupby
from typing import NamedTuple

from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface, Shape

MEANINGS = {
    contract.INPUT_IDS: "tokens of this call",
    contract.ATTENTION_MASK: "1 for text, 0 for padding, for past and new tokens",
    contract.WRITE_MASK: "tokens that write, or that belong to a segment",
    contract.PAST_LENGTH: "number of columns of keys and values in use; 0 in the first call",
    contract.SEGMENT_END: "tokens that end a segment, which is then written",
    contract.KEY: "attention keys; empty in the first call",
    contract.VALUE: "attention values; empty in the first call",
    contract.STATE: "memory; zeros or the states of a memory file in the first call",
    contract.SEGMENT: "sums over the open segment; zeros in the first call",
    contract.CONV: "not used: onnxruntime-genai needs it to find the state",
    contract.INDEXER_KEY: "keys of an indexer; empty in the first call",
    **dict.fromkeys(contract.COLUMNS[1:], "inputs of the base model's compression; empty in the first call"),
}
AFTERWARDS = {
    contract.KEY: "attention keys, including those of this call",
    contract.VALUE: "attention values, including those of this call",
    contract.STATE: "memory after this call",
    contract.SEGMENT: "sums over the open segment after this call",
    contract.CONV: MEANINGS[contract.CONV],
    contract.INDEXER_KEY: "keys of an indexer, including those of this call",
    **dict.fromkeys(contract.COLUMNS[1:], "inputs of the base model's compression, including those of this call"),
}
# States of the base model, by the beginning of their part's name.
BASE_MEANINGS = {
    contract.CONV: "last inputs of a convolution; zeros in the first call",
    contract.STATE: "state of the base model's linear attention; zeros in the first call",
    contract.SSM: "state of the base model's linear attention; zeros in the first call",
    contract.PLE_CONV: "last inputs of the n-gram convolution; zeros in the first call",
    contract.PLE_TOKENS: "last tokens, for n-grams; zeros in the first call",
}
BASE_AFTERWARDS = {
    contract.CONV: "last inputs of a convolution after this call",
    contract.STATE: "state of the base model's linear attention after this call",
    contract.SSM: "state of the base model's linear attention after this call",
    contract.PLE_CONV: "last inputs of the n-gram convolution after this call",
    contract.PLE_TOKENS: "last tokens after this call, for n-grams",
}
LOGITS = {"last": "logits of the last position", "all": "logits of every position"}


class Row(NamedTuple):
    """One input or output, or the same one of several consecutive layers."""

    kind: str  # "input", "default" (an input that can be left out) or "output"
    name: str  # for several layers: past_key_values.{0…35}.key
    type: str
    shape: Shape
    meaning: str


def rows(interface: Interface) -> list[Row]:
    """Return all inputs and outputs of the graph. Consecutive layers with the same shapes share a row."""
    tables = {"input": interface.inputs(), "default": interface.defaults(), "output": interface.outputs()}
    return [
        row
        for kind, tensors in tables.items()
        for row in _rows(kind, tensors, _meanings(kind, interface), interface.base_states.keys())
    ]


def markdown(interface: Interface) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| | name | type | shape | meaning |", "|---|---|---|---|---|"]
    for row in rows(interface):
        shape = ", ".join(map(str, row.shape))
        lines.append(f"| {row.kind} | `{row.name}` | {row.type} | [{shape}] | {row.meaning} |")
    return "\n".join(lines) + "\n"


def _meanings(kind: str, interface: Interface) -> dict[str, str]:
    """Return the meanings of inputs or outputs of this graph, by the name of a tensor or of a part."""
    if kind == "default":
        return {contract.STATE: "memory that new conversations start from"}
    meanings = MEANINGS if kind == "input" else {**AFTERWARDS, contract.LOGITS_OUTPUT: LOGITS[interface.logits]}
    if not interface.max_length:
        return meanings
    room = f"room for {interface.max_length:,} tokens"
    buffers = {part: meanings[part].replace("empty", f"{room}, zeros") for part in (contract.KEY, contract.VALUE)}
    if kind == "output":
        return {**meanings, **{part: f"{meaning}, {room}" for part, meaning in buffers.items()}}
    return {**meanings, **buffers, contract.ATTENTION_MASK: "1 for text, 0 for padding and unused columns"}


def _rows(
    kind: str, tensors: dict[str, tuple[str, Shape]], meanings: dict[str, str], base_states: Collection[str]
) -> Iterator[Row]:
    # (layer, prefix, type, shape) by part and by whether it is a state of the base model.
    carried: dict[tuple[str, bool], list[tuple[int, str, str, Shape]]] = {}
    for name, (dtype, shape) in tensors.items():
        if name in meanings:
            yield Row(kind, name, dtype, shape, meanings[name])
        else:
            prefix, layer, part = name.split(".")
            is_base = contract.carried_name(contract.PAST, int(layer), part) in base_states
            carried.setdefault((part, is_base), []).append((int(layer), prefix, dtype, shape))
    for (part, is_base), entries in carried.items():
        meaning = _base_meaning(kind, part) if is_base else meanings[part]
        # In a run of consecutive layers, the layer's number minus its position in the list is constant.
        alike = groupby(enumerate(entries), key=lambda entry: (entry[1][0] - entry[0], entry[1][1:]))
        for (_, (prefix, dtype, shape)), run in alike:
            layers = [layer for _, (layer, *_) in run]
            span = str(layers[0]) if len(layers) == 1 else f"{{{layers[0]}…{layers[-1]}}}"
            yield Row(kind, f"{prefix}.{span}.{part}", dtype, shape, meaning)


def _base_meaning(kind: str, part: str) -> str:
    """Return the meaning of a state of the base model. A layer's second convolution is `conv_state_1`."""
    meanings = BASE_AFTERWARDS if kind == "output" else BASE_MEANINGS
    return next(meaning for beginning, meaning in meanings.items() if part.startswith(beginning))
