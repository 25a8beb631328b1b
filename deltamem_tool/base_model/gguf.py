"""A checkpoint in a single GGUF file, the format of llama.cpp: find it, check that it is complete, read parts of it.

transformers builds the config, the tokenizer and the model from it, in floating point. `gguf` reads and dequantises
individual weights.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltamem_tool.base_model.weights import WEIGHT_FILES
from deltamem_tool.errors import ArchitectureError, first_line
from deltamem_tool.io.installation import check_installation
from deltamem_tool.io.names import hub_name, is_gguf

if TYPE_CHECKING:
    from gguf import ReaderTensor

_MAGIC = b"GGUF"
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)


def pretrained_arguments(source: str | Path) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a folder, a GGUF file, or either on the Hub."""
    if not is_gguf(source) or Path(source).is_dir():
        return {"pretrained_model_name_or_path": source}
    hub = hub_name(str(source))
    place, file = (Path(source).parent, Path(source).name) if hub is None else (hub.id, hub.path_in_repo)
    return {"pretrained_model_name_or_path": place, "gguf_file": file}


def source_of(model: PreTrainedModel) -> str:
    """Return the path or Hub id of a loaded model, or "". transformers keeps folder and name of a GGUF file apart."""
    place = model.name_or_path or ""
    file = getattr(getattr(model.config, "quantization_config", None), "gguf_file", None)
    if file is None or is_gguf(place):
        return place
    return str(Path(place, file)) if Path(place).is_dir() else f"{place}:{file}"


def find_gguf(place: Path) -> Path | None:
    """Return `place` if it is a GGUF file, or the only one in a folder without other weights; else None.

    Raises:
        ArchitectureError: the folder has several, or the file is one part of a model.
    """
    if not place.is_dir():
        file = place if is_gguf(place) and place.is_file() else None
    elif any((place / weights).is_file() for weights in WEIGHT_FILES):
        file = None
    else:
        files = sorted(path for path in place.iterdir() if is_gguf(path) and path.is_file())
        if len(files) > 1 and not _PART.search(files[0].name):
            names = ", ".join(path.name for path in files)
            raise ArchitectureError(f"{place} has several GGUF files.", f"They are {names}.", "Pass one of the files.")
        file = files[0] if files else None
    if file is not None:
        check_complete(file.name)
    return file


def check_complete(name: str) -> None:
    """Check by its name that a file is not one of several parts.

    Raises:
        ArchitectureError: it is one of several parts.
    """
    part = _PART.search(name)
    if part and int(part[1]) > 1:
        raise ArchitectureError(
            f"{name} is one of {int(part[1])} parts of a model.",
            "transformers reads a GGUF checkpoint from one file.",
            "Join the parts with llama.cpp: llama-gguf-split --merge FIRST_PART OUT.gguf",
        )


class GgufFile:
    """A complete GGUF file, whose tensors are read when they are needed.

    Args:
        path: the file.
        name: what the user calls it.

    Raises:
        ArchitectureError: it is not a GGUF file, is truncated, or has weights in a format that `gguf` cannot read.
        InstallationError: the package `gguf` is missing.
    """

    def __init__(self, path: Path, name: str) -> None:
        check_installation("gguf")
        from gguf import GGUFReader

        self.path, self.name = path, name
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ArchitectureError(
                    f"{name} is not a GGUF file.", f"It does not begin with {_MAGIC.decode()}.", "Use another file."
                )
        try:
            self.reader = GGUFReader(path)
            self.architecture = str(self.reader.fields["general.architecture"].contents())
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise ArchitectureError(
                f"{name} cannot be read.", f"{first_line(error)}.", "The file may be cut short: fetch it again."
            ) from error
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in self.reader.tensors}
        self._check_formats()

    def _check_formats(self) -> None:
        from gguf import GGML_QUANT_SIZES, dequantize

        for tensor in {tensor.tensor_type: tensor for tensor in self.tensors.values()}.values():
            bytes_of_block = GGML_QUANT_SIZES[tensor.tensor_type][1]
            try:
                dequantize(tensor.data.reshape(-1)[: bytes_of_block // tensor.data.itemsize], tensor.tensor_type)
            except NotImplementedError as error:
                raise ArchitectureError(
                    f"{self.name} has weights in the format {tensor.tensor_type.name}.",
                    f"{first_line(error)}.",
                    "Use the model in another format, such as Q8_0 or Q4_K_M.",
                ) from error


class GgufWeights:
    """The weights of a GGUF file under their names in the model, in float32.

    Args:
        file: the file.
        model: the model that transformers builds from its config; it needs no weights.

    Raises:
        ArchitectureError: the file does not match the model.
    """

    def __init__(self, file: GgufFile, model: PreTrainedModel) -> None:
        from deltamem_tool._compat import TENSOR_PROCESSORS  # makes transformers import tokenizers

        self._file = file
        config = model.config.get_text_config(decoder=True)
        self._stored_as = _names_in(file, model, config.num_hidden_layers)
        for name, weight in model.state_dict().items():
            # Some weights are stored transposed, or without an axis of size 1.
            if name in self._stored_as and math.prod(self.shape(name)) != weight.numel():
                raise ArchitectureError(
                    f"{file.name} does not match the model that transformers builds from its metadata.",
                    f"{self._stored_as[name]} is {self.shape(name)}, but {name} of the model is {list(weight.shape)}.",
                    "Use the model's original checkpoint: a folder of save_pretrained, or its Hub id.",
                )
        processor = TENSOR_PROCESSORS.get(file.architecture)
        self._keeps_columns = processor in (None, TENSOR_PROCESSORS["llama"])
        self._processor = None if processor is None else processor(config=config.to_dict())

    @property
    def names(self) -> list[str]:
        """The names of the weights in the model."""
        return list(self._stored_as)

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """Return a part of one weight, or all of it if it is not a matrix."""
        from gguf import GGML_QUANT_SIZES, dequantize

        tensor = self._file.tensors[self._stored_as[name]]
        data = tensor.data  # `[out, bytes or numbers in]`, mapped from disk
        if data.ndim == 2 and columns.stop is not None and self._keeps_columns:
            of_block, bytes_of_block = GGML_QUANT_SIZES[tensor.tensor_type]
            data = data[:, : -(-columns.stop // of_block) * bytes_of_block // data.itemsize]
        weight = dequantize(np.ascontiguousarray(data), tensor.tensor_type)
        if self._processor is not None:
            weight = self._processor.process(weights=weight, name=tensor.name).weights
        return torch.from_numpy(np.array(weight[rows, columns] if weight.ndim == 2 else weight))

    def shape(self, name: str) -> list[int]:
        """Return the shape of one weight, as it is stored."""
        return [int(size) for size in reversed(self._file.tensors[self._stored_as[name]].shape)]


def _names_in(file: GgufFile, model: PreTrainedModel, layers: int) -> dict[str, str]:
    """Return the names in the file by those in the model; empty if `gguf` does not know the architecture."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next((known for known, name in MODEL_ARCH_NAMES.items() if name == file.architecture), None)
    if architecture is None:
        return {}
    names, stored_as = get_tensor_name_map(architecture, layers), {}
    for name in model.state_dict():
        module, _, kind = name.rpartition(".")
        # Some converters started from the model without its head, whose weight names lack a prefix.
        stored = names.get_name(module) or names.get_name(module.removeprefix(f"{model.base_model_prefix}."))
        if stored is not None and f"{stored}.{kind}" in file.tensors:
            stored_as[name] = f"{stored}.{kind}"
    return stored_as
