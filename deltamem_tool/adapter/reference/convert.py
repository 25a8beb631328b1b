"""Convert adapters of the reference implementation (declare-lab/delta-Mem) to our format and back, bit for bit.

The reference implementation saves `delta_mem_config.json`, with 49 fields, and `delta_mem_adapter.pt`, a pickled
dictionary of tensors. What our mechanism does not need of them (fields, their order, the dtype of the weights) is kept
under "reference" in our config file. The pickle is read with torch's weights-only loader, which builds tensors and runs
no code. `adapter.reference.config` translates the fields.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from deltamem_tool.adapter.config_file import CONFIG_FILE, BaseModel
from deltamem_tool.adapter.find_base import base_of, find_base
from deltamem_tool.adapter.folder import name_in, read_adapter
from deltamem_tool.adapter.load import shapes_of
from deltamem_tool.adapter.reference.config import DEFAULTS, REFERENCE_CONFIG, config_of, mechanism_of
from deltamem_tool.adapter.save import write_adapter
from deltamem_tool.base_model.attention import AttentionLayer, select_layers
from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.config import BRANCHES, DeltaMemConfig
from deltamem_tool.errors import AdapterError, ArchitectureError, ConfigError, DeltaMemError, first_line
from deltamem_tool.io.atomic import atomic_folder, check_overwrite, resolve
from deltamem_tool.io.names import check_revision, expand_name, expand_user, resolve_folder
from deltamem_tool.io.safe_json import read_json
from deltamem_tool.memory.adapter import DeltaMemAdapter

REFERENCE_WEIGHTS = "delta_mem_adapter.pt"
FORMATS = ("deltamem", "reference")

# The reference's name for each parameter of a layer, in the order in which it saves them.
NAMES = {
    "delta_scale_raw": "scale_raw",
    "memory_q_proj": "query.weight",
    "memory_k_proj": "key.weight",
    "memory_v_proj": "value.weight",
    **{f"delta_{branch}_proj": f"delta.{branch}.weight" for branch in BRANCHES},
    "delta_o_rmsnorm_weight": "o_norm.weight",
    "beta_proj": "gate.weight",
    "beta_bias": "gate.bias",
    "lambda_proj": "decay.weight",
    "lambda_bias": "decay.bias",
}

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}  # float32 represents all of them exactly


@dataclass(frozen=True)
class Conversion:
    """What `convert` has written."""

    path: Path
    format: str  # one of FORMATS
    base: BaseModel
    parameters: int  # in the folder; the reference also saves zeros for branches that are off
    dtypes: tuple[str, ...]  # of the reference's tensors, the most frequent first


def convert(
    src: str | Path,
    dst: str | Path,
    base: str | None = None,
    to: str = "deltamem",
    revision: str | None = None,
    base_revision: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert an adapter from the reference implementation's format to deltamem's, or back.

    The conversion keeps every bit in both directions: an adapter that is converted and converted back has the same
    tensors (values, dtypes, order) and the same config.

    Args:
        src: folder or Hub id of the adapter.
        dst: folder to write, whole or not at all.
        base: folder or Hub id of the base model. The reference implementation does not record it, so it is required
            when `to` is "deltamem". When `to` is "reference", it defaults to the one that the adapter records.
        to: format to write, "deltamem" or "reference".
        revision: branch, tag or commit of the adapter on the Hub.
        base_revision: branch, tag or commit of the base model on the Hub.
        overwrite: replace `dst` if it exists.

    Raises:
        AdapterError: `src` is damaged, is not an adapter of the other format, contains something that the conversion
            would lose, or does not fit `base`. The message names the differences.
        ArchitectureError: `base` cannot be loaded, or the reference implementation does not support it.
        DeltaMemError: `dst` exists, or cannot be written.

    Example:
        >>> import deltamem_tool as deltamem
        >>> deltamem.convert("builtin:adapter", "reference-adapter", to="reference").format
        'reference'
        >>> deltamem.convert("reference-adapter", "my-adapter", base="builtin:backbone").format
        'deltamem'
    """
    if to not in FORMATS:
        raise ConfigError(
            f"There is no adapter format {to!r}.", f"The formats are {', '.join(FORMATS)}.", "Use one of these names."
        )
    src, dst, base = expand_name(src), expand_user(dst), None if base is None else expand_name(base)
    for source in (src, base):
        if source and Path(source).is_dir() and resolve(source).is_relative_to(resolve(dst)):
            raise DeltaMemError(f"{dst} is or contains {source}.", "It would be replaced.", "Choose another folder.")
    check_overwrite(dst, overwrite)
    direction = _from_reference if to == "deltamem" else _to_reference
    return direction(src, dst, base, revision, base_revision, overwrite)


def _from_reference(
    src: str, dst: Path, base: str | None, revision: str | None, base_revision: str | None, overwrite: bool
) -> Conversion:
    check_revision(src, revision)
    folder = resolve_folder(src, revision, [REFERENCE_CONFIG, REFERENCE_WEIGHTS], "adapter")
    for name in (REFERENCE_CONFIG, REFERENCE_WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(
                f"{src} is not an adapter of the reference implementation.",
                f"It has no {name}.",
                "It is a deltamem adapter: pass --to reference (to=)." if _is_ours(folder) else "Use another folder.",
            )
    fields = _read_config(folder / REFERENCE_CONFIG)
    config = mechanism_of(fields, folder / REFERENCE_CONFIG)
    if base is None:
        raise AdapterError(
            f"{src} does not say what its base model is.",
            "Adapters of the reference implementation do not record it.",
            "Pass the model that it was trained on: base=, or --base on the command line.",
        )
    check_revision(base, base_revision)
    checkpoint = BaseCheckpoint(base, base_revision)
    layers = _layers(checkpoint, config)
    adapter = _on_meta(config, layers)
    tensors = _read_pickle(folder / REFERENCE_WEIGHTS)
    _check_tensors(tensors, adapter, layers, folder / REFERENCE_WEIGHTS)
    ours = {
        name: tensors[theirs].detach().to(torch.float32, copy=True).contiguous()
        for theirs, name, _ in _entries(adapter, layers)
        if name is not None
    }
    adapter.load_state_dict(ours, assign=True)
    base_model = base_of(checkpoint)
    dtypes = {name: str(tensors[name].dtype).removeprefix("torch.") for name, _, _ in _entries(adapter, layers)}
    by_count = tuple(name for name, _ in Counter(dtypes.values()).most_common())
    origin: dict[str, Any] = {"config": fields, "dtype": by_count[0]}
    if len(by_count) > 1:
        origin["other_dtypes"] = {name: dtype for name, dtype in dtypes.items() if dtype != by_count[0]}
    write_adapter(adapter, base_model, dst, overwrite, origin)
    return Conversion(dst, "deltamem", base_model, adapter.num_parameters(), by_count)


def _to_reference(
    src: str, dst: Path, base: str | None, revision: str | None, base_revision: str | None, overwrite: bool
) -> Conversion:
    if Path(src).is_dir() and not _is_ours(Path(src)) and (Path(src) / REFERENCE_CONFIG).is_file():
        raise AdapterError(
            f"{src} is already an adapter of the reference implementation.",
            "There is nothing to convert.",
            "Leave --to (to=) out to convert it to deltamem's format.",
        )
    folder = read_adapter(src, revision)
    checkpoint, base_model = find_base(src, folder.base, base, base_revision)
    layers = _layers(checkpoint, folder.config)
    adapter = _on_meta(folder.config, layers)
    folder.check_shapes(shapes_of(adapter))
    original, dtype, other_dtypes = _origin(folder.reference, folder.path)
    config = config_of(folder.config, [layer.index for layer in layers], original)
    numbers = folder.numbers()
    exact = {
        theirs: torch.zeros(shape, dtype=torch.float32) if name is None else torch.tensor(numbers[name])
        for theirs, name, shape in _entries(adapter, layers)
    }
    tensors = {name: exact[name].to(_DTYPES[other_dtypes.get(name, dtype)], copy=True) for name in exact}
    if not all(torch.equal(tensor.float(), exact[name]) for name, tensor in tensors.items()):
        tensors = exact  # trained since the conversion, so the original dtype would round them
    with atomic_folder(dst, overwrite) as staged:
        (staged / REFERENCE_CONFIG).write_text(json.dumps(config, indent=2))
        torch.save(tensors, staged / REFERENCE_WEIGHTS)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    count = sum(tensor.numel() for tensor in tensors.values())
    return Conversion(dst, "reference", base_model, count, tuple(name for name, _ in dtypes.most_common()))


def _origin(kept: Mapping[str, Any] | None, folder: Path) -> tuple[Mapping[str, Any], str, Mapping[str, str]]:
    """Return the recorded config, dtype and dtypes by name of the reference's adapter, or the usual ones.

    Raises:
        AdapterError: the record is damaged.
    """
    if kept is None:
        return DEFAULTS, "float32", {}
    config, dtype, others = kept.get("config"), kept.get("dtype"), kept.get("other_dtypes", {})
    known = isinstance(others, dict) and all(name in list(_DTYPES) for name in (dtype, *others.values()))
    if not isinstance(config, dict) or not isinstance(dtype, str) or not known:
        raise AdapterError(
            f"The record of the reference's adapter in {folder} is damaged.",
            'The entry "reference" of its config is not one that deltamem writes.',
            "Fetch the adapter again, or remove that entry.",
        )
    mechanism_of(config, folder)
    return config, dtype, others


def _entries(
    adapter: DeltaMemAdapter, layers: Sequence[AttentionLayer]
) -> Iterator[tuple[str, str | None, tuple[int, ...]]]:
    """Every tensor of the reference's file, in its order.

    Yields:
        Its name there; its name in our state dict, or None for the Δ of a branch that is off; its shape.
    """
    for layer in layers:
        memory = adapter.layer(layer.index)
        shapes = {name: tuple(tensor.shape) for name, tensor in memory.state_dict().items()}
        for theirs, ours in NAMES.items():
            name = f"{layer.name}.{theirs}"
            if ours in shapes:
                yield name, name_in(layer.index, ours), shapes[ours]
            elif ours.startswith("delta."):
                branch = ours.split(".")[1]
                width = adapter.config.state_heads * adapter.config.rank
                yield name, None, (layer.projection(branch).out_features, width)


def _layers(checkpoint: BaseCheckpoint, config: DeltaMemConfig) -> list[AttentionLayer]:
    """Return the layers with a memory, as modules without weights, after checking that the reference supports them."""
    layers = select_layers(checkpoint.layers, config)
    other = [layer.name for layer in layers if layer.name != f"model.layers.{layer.index}.self_attn"]
    if other:
        raise ArchitectureError(
            f"The reference implementation does not support the attention of {checkpoint.name}.",
            f"Its module is called {other[0]}, not model.layers.N.self_attn.",
            "Use a base model such as Qwen3 or SmolLM3.",
        )
    return layers


def _on_meta(config: DeltaMemConfig, layers: Sequence[AttentionLayer]) -> DeltaMemAdapter:
    """Return an adapter on the meta device, which draws no random numbers."""
    with torch.device("meta"):
        return DeltaMemAdapter(config, layers)


def _is_ours(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def _read_config(file: Path) -> dict[str, Any]:
    try:
        fields = read_json(file, finite=False)  # what is not a number is named below
    except ValueError as error:
        raise AdapterError(f"{file} is not JSON.", f"{error}.", "Fetch the adapter again.") from error
    if not isinstance(fields, dict):
        raise AdapterError(f"{file} is not an adapter config.", "It is not a JSON object.", "Fetch the adapter again.")
    return fields


def _read_pickle(file: Path) -> dict[Any, Any]:
    """Read the dictionary that torch.save has written. No code in `file` is run, and its content is not checked yet.

    Raises:
        AdapterError: the file is damaged, is not a dictionary, or names something that torch cannot build without
            running code.
    """
    content = io.BytesIO(file.read_bytes())  # so that errors of the disk are not taken for errors of the reader
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles in other protocols, which are read or rejected as well
            tensors = torch.load(content, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"It names {named[1]}, which is not a tensor" if named else "It contains something other than tensors"
        raise AdapterError(
            f"{file} was not loaded.", f"{why}; no code in it was run.", "Do not use this file: it may be malicious."
        ) from error
    except Exception as error:  # a damaged pickle can raise any exception
        raise AdapterError(f"{file} is damaged.", f"{first_line(error)}.", "Fetch the adapter again.") from error
    if not isinstance(tensors, dict):
        raise AdapterError(
            f"{file} is not an adapter.",
            f"It contains a {type(tensors).__name__}, not a dictionary.",
            "Use another file.",
        )
    return tensors


def _check_tensors(
    tensors: Mapping[Any, Any], adapter: DeltaMemAdapter, layers: Sequence[AttentionLayer], file: Path
) -> None:
    """Check that the tensors fit `adapter` on `layers` and that none would be lost. The error names all of them."""
    wanted = {theirs: (ours, shape) for theirs, ours, shape in _entries(adapter, layers)}
    differences = [f"missing {name}" for name in wanted.keys() - tensors.keys()]
    differences += [f"extra {name!r}" for name in tensors.keys() - wanted.keys()]
    for name in wanted.keys() & tensors.keys():
        tensor, (ours, shape) = tensors[name], wanted[name]
        # Shapes before values: a file of a few bytes can claim a tensor that fills the memory.
        if not isinstance(tensor, Tensor):
            differences.append(f"{name} is a {type(tensor).__name__}, not a tensor")
        elif tensor.layout != torch.strided or tensor.device.type != "cpu":
            differences.append(f"{name} is not a dense CPU tensor")
        elif tensor.dtype not in _DTYPES.values():
            differences.append(f"{name} is {tensor.dtype}, not one of {', '.join(_DTYPES)}")
        elif tuple(tensor.shape) != shape:
            differences.append(f"{name} is {list(tensor.shape)}, not {list(shape)}")
        elif not tensor.isfinite().all():
            differences.append(f"{name} contains NaN or infinity")
        elif ours is None and tensor.any():
            differences.append(f"{name} is not zero, but its branch is not in delta_heads: it would be lost")
    if differences:
        raise AdapterError(
            f"{file} does not fit its config and base model.",
            f"Differences: {'; '.join(sorted(differences))}.",
            "Fetch the adapter again, or pass the base model that it was trained on.",
        )
