"""A readable table of the inputs and outputs of a graph, for one ONNX folder or for the documentation."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import groupby
from typing import NamedTuple

from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface, Shape

MEANINGS = {
    contract.INPUT_IDS: "tokens of this call",
    contract.ATTENTION_MASK: "1 for text, 0 for padding, past and new",
    contract.WRITE_MASK: "which tokens write, or belong to a segment",
    contract.PAST_LENGTH: "how many columns of keys and values are taken, 0 at first",
    contract.SEGMENT_END: "which tokens end a segment, which is written then",
    contract.KEY: "attention's keys, empty at first",
    contract.VALUE: "attention's values, empty at first",
    contract.STATE: "the memory, zeros or a memory file's at first",
    contract.SEGMENT: "what the open segment has gathered, zeros at first",
    contract.CONV: "nothing: onnxruntime-genai looks for it",
    contract.INDEXER_KEY: "the keys of an indexer, empty at first",
    **dict.fromkeys(contract.COLUMNS[1:], "what the base compresses, empty at first"),
}
AFTERWARDS = {
    contract.KEY: "attention's keys, this call's too",
    contract.VALUE: "attention's values, this call's too",
    contract.STATE: "the memory after this call",
    contract.SEGMENT: "what the open segment has gathered by then",
    contract.CONV: MEANINGS[contract.CONV],
    contract.INDEXER_KEY: "the keys of an indexer, this call's too",
    **dict.fromkeys(contract.COLUMNS[1:], "what the base compresses, this call's too"),
}
# Of states of the base's own, by what their part begins with.
BASE_MEANINGS = {
    contract.CONV: "a convolution's last inputs, zeros at first",
    contract.STATE: "the state of the base's linear attention, zeros at first",
    contract.SSM: "the state of the base's linear attention, zeros at first",
    contract.PLE_CONV: "the last inputs of the convolution of n-grams, zeros at first",
    contract.PLE_TOKENS: "the last tokens, for n-grams, zeros at first",
}
BASE_AFTERWARDS = {
    contract.CONV: "a convolution's last inputs by then",
    contract.STATE: "the state of the base's linear attention by then",
    contract.SSM: "the state of the base's linear attention by then",
    contract.PLE_CONV: "the last inputs of the convolution of n-grams by then",
    contract.PLE_TOKENS: "the last tokens by then",
}
LOGITS = {"last": "of the last position", "all": "of every position"}


class Row(NamedTuple):
    """One input or output, or one of several layers that are alike."""

    kind: str  # "input", "default" (an input that can be left out) or "output"
    name: str  # of layers that are alike: past_key_values.{0…35}.key
    type: str
    shape: Shape
    meaning: str


def rows(interface: Interface) -> list[Row]:
    """Return all inputs and outputs of the graph; consecutive layers that are alike share a row."""
    tables = {"input": interface.inputs(), "default": interface.defaults(), "output": interface.outputs()}
    return [
        row
        for kind, tensors in tables.items()
        for row in _rows(kind, tensors, _meanings(kind, interface), interface.base_states.keys())
    ]


def markdown(interface: Interface) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| | name | type | shape | what |", "|---|---|---|---|---|"]
    for row in rows(interface):
        shape = ", ".join(map(str, row.shape))
        lines.append(f"| {row.kind} | `{row.name}` | {row.type} | [{shape}] | {row.meaning} |")
    return "\n".join(lines) + "\n"


def _meanings(kind: str, interface: Interface) -> dict[str, str]:
    """Of what is `kind` in this graph, by the name of a tensor or of a part."""
    if kind == "default":
        return {contract.STATE: "another memory for conversations to begin with"}
    meanings = MEANINGS if kind == "input" else {**AFTERWARDS, contract.LOGITS_OUTPUT: LOGITS[interface.logits]}
    if not interface.max_length:
        return meanings
    room = f"room for {interface.max_length:,} tokens"
    buffers = {part: meanings[part].replace("empty", f"{room}, zeros") for part in (contract.KEY, contract.VALUE)}
    if kind == "output":
        return {**meanings, **{part: f"{meaning}, {room}" for part, meaning in buffers.items()}}
    return {**meanings, **buffers, contract.ATTENTION_MASK: "1 for text, 0 for padding or nothing yet"}


def _rows(
    kind: str, tensors: dict[str, tuple[str, Shape]], meanings: dict[str, str], base_states: Collection[str]
) -> Iterator[Row]:
    # By part, and whether it is of the base's own states: layer, prefix, type, shape.
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
        # Layers that follow each other share what remains when their place in the row is taken off their number.
        alike = groupby(enumerate(entries), key=lambda entry: (entry[1][0] - entry[0], entry[1][1:]))
        for (_, (prefix, dtype, shape)), run in alike:
            layers = [layer for _, (layer, *_) in run]
            span = str(layers[0]) if len(layers) == 1 else f"{{{layers[0]}…{layers[-1]}}}"
            yield Row(kind, f"{prefix}.{span}.{part}", dtype, shape, meaning)


def _base_meaning(kind: str, part: str) -> str:
    """Of a state of the base's own; a layer's second convolution is `conv_state_1`."""
    meanings = BASE_AFTERWARDS if kind == "output" else BASE_MEANINGS
    return next(meaning for beginning, meaning in meanings.items() if part.startswith(beginning))
