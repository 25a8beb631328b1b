"""The stored weights of a checkpoint: one file or several, as safetensors or in torch's own format.

Parts of them can be read without the rest.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltamem_tool.errors import ArchitectureError, first_line
from deltamem_tool.io.safe_json import parse_json, read_text

# In transformers' order: a file with all weights, or the index of several.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MAX_INDEX_BYTES = 128 * 2**20  # the largest known index, of 90,000 weights, has 9 MB
_AGAIN = "The file may be cut short: fetch the checkpoint again."


def files_of_index(index: Path) -> dict[str, str]:
    """Return the file of each weight from an `….index.json`.

    Raises:
        ArchitectureError: the file is not such an index, or names files outside its folder.
    """
    try:
        files = dict(parse_json(read_text(index, MAX_INDEX_BYTES))["weight_map"])
        if not files or not all(isinstance(file, str) and Path(file).name == file for file in files.values()):
            raise ValueError("weight_map must name files beside it")
    except (ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}."
        raise ArchitectureError(f"{index} is not a weight index.", why, "Fetch the checkpoint again.") from error
    return files


class StoredWeights:
    """The weights in `folder`, each read when it is needed.

    Raises:
        ArchitectureError: the folder has no weights, or a file is missing or damaged.
    """

    def __init__(self, folder: Path, checkpoint: str) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self._old: dict[str, Mapping[str, Tensor]] = {}  # files of torch before 1.6, which must be read whole
        self._file_of = self._index()

    @property
    def names(self) -> list[str]:
        """The names of the weights on disk."""
        return list(self._file_of)

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """Return a part of one weight, or all of it if it is not a matrix.

        Raises:
            ArchitectureError: the file is missing, truncated or not safetensors.
        """
        file = self.folder / self._file_of[name]
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as tensors:
                    stored = tensors.get_slice(name)
                    is_matrix = len(stored.get_shape()) == 2
                    part: Tensor = stored[rows, columns] if is_matrix else tensors.get_tensor(name)
                    return part
            except (SafetensorError, OSError) as error:
                raise ArchitectureError(f"{file} cannot be read.", f"{error}.", _AGAIN) from error
        weight = self._torch_file(file)[name]
        # A copy, so that the file is not kept in memory.
        return (weight[rows, columns] if weight.ndim == 2 else weight).clone()

    def shape(self, name: str) -> list[int]:
        """Return the shape of one weight, without reading it."""
        file = self.folder / self._file_of[name]
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return list(tensors.get_slice(name).get_shape())
        return list(self._torch_file(file)[name].shape)

    def _index(self) -> dict[str, str]:
        """The file of each weight. Every file is opened, to check that it exists and is complete."""
        file = next((file for file in WEIGHT_FILES if (self.folder / file).is_file()), None)
        if file is None:
            raise ArchitectureError(
                f"{self.checkpoint} has no safetensors weights.",
                f"There is neither a model.safetensors nor a pytorch_model.bin in {self.folder}.",
                "Save the model with save_pretrained, or use another checkpoint.",
            )
        if not file.endswith(".json"):
            return dict.fromkeys(self._names_in(file), file)
        file_of = files_of_index(self.folder / file)
        names_in = {file: self._names_in(file) for file in sorted(set(file_of.values()))}
        lacking = [name for name, file in file_of.items() if name not in names_in[file]]
        if lacking:
            raise ArchitectureError(
                f"{self.folder / file_of[lacking[0]]} does not match the index.",
                f"It lacks {lacking[0]}.",
                "Fetch the checkpoint again.",
            )
        return file_of

    def _names_in(self, file: str) -> set[str]:
        path = self.folder / file
        if path.suffix != ".safetensors":
            return set(self._torch_file(path))
        try:
            with safe_open(path, "pt") as tensors:
                return set(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ArchitectureError(f"{path} cannot be read.", f"{error}.", _AGAIN) from error

    def _torch_file(self, path: Path) -> Mapping[str, Tensor]:
        """Open a `.bin`, which is a pickle, with torch's reader that runs no code, as transformers does.

        The file is closed with the result. A reader that stayed open would end up with all of it in memory.
        """
        if path.name in self._old:
            return self._old[path.name]
        try:
            in_parts = zipfile.is_zipfile(path)
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=in_parts)
            if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
                raise ValueError("It is not a mapping from names to weights")
        except pickle.UnpicklingError as error:
            raise ArchitectureError(
                f"{path} cannot be read.",
                "It is cut short, or contains more than weights.",
                "Fetch the checkpoint again.",
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise ArchitectureError(f"{path} cannot be read.", f"{first_line(error)}.", _AGAIN) from error
        if not in_parts:
            self._old[path.name] = weights
        return weights
