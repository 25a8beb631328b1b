"""A base checkpoint on disk, looked at without loading it: its config, its module tree, a few columns of weights."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deltamem_tool.architectures import AttentionLayer
from deltamem_tool.errors import ArchitectureError

SAMPLED = 64  # numbers of each query projection that the fingerprint looks at
BUILTIN = "builtin:"  # what the package ships is named builtin:backbone and builtin:adapter
ASSETS = Path(__file__).parent / "assets"
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def fingerprint(layers: Iterable[AttentionLayer], first_row: Callable[[AttentionLayer], Tensor]) -> str:
    """SHA-256 over a few numbers of every attention layer's query projection, as float32: another model, or the same
    one after fine-tuning, has another. `first_row` gives `[1, n]` numbers of a layer's query weight."""
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(first_row(layer)[:, :SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()


class BaseCheckpoint:
    """A folder of `save_pretrained`, or a Hub id.

    Args:
        name: folder or `owner/name`.
        revision: branch, tag or commit on the Hub.

    Raises:
        ArchitectureError: nothing is there, or it is no causal language model.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name = str(name)
        self.folder = resolve_folder(self.name, revision, _FILES, "checkpoint")
        self.revision = self.folder.name if self.folder.parent.name == "snapshots" else None
        self.config = _read_config(self.folder, self.name)
        self._file_of = self._index()

    def skeleton(self) -> PreTrainedModel:
        """The model without weights (on torch's meta device): its module tree and shapes."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config)

    def read(self, weight: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """A part of one weight matrix, as stored; only that part is read from disk."""
        if weight not in self._file_of:
            raise ArchitectureError(
                f"{self.name} has no weight {weight!r}.", "The checkpoint is not complete.", "Use another checkpoint."
            )
        file = self.folder / self._file_of[weight]
        try:
            with safe_open(file, "pt") as tensors:
                return tensors.get_slice(weight)[rows, columns]
        except (SafetensorError, OSError) as error:
            raise ArchitectureError(
                f"{file} cannot be read.", f"{error}.", "The file may be cut short: fetch the checkpoint again."
            ) from error

    def fingerprint(self, layers: Iterable[AttentionLayer]) -> str:
        return fingerprint(layers, lambda layer: self.read(layer.weight_name("q"), slice(0, 1), slice(0, SAMPLED)))

    def _index(self) -> dict[str, str]:
        """File of each weight."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ArchitectureError(
                    f"{index} is no index of weights.", f"{error!r}.", "Fetch the checkpoint again."
                ) from error
        single = self.folder / "model.safetensors"
        if not single.is_file():
            raise ArchitectureError(
                f"{self.name} has no safetensors weights.",
                f"There is no model.safetensors in {self.folder}.",
                "Save the model with save_pretrained, or use another checkpoint.",
            )
        try:
            with safe_open(single, "pt") as tensors:
                return dict.fromkeys(tensors.keys(), single.name)
        except (SafetensorError, OSError) as error:
            raise ArchitectureError(
                f"{single} cannot be read.", f"{error}.", "The file may be cut short: fetch the checkpoint again."
            ) from error


def resolve_folder(name: str, revision: str | None, files: list[str], what: str) -> Path:
    """The local folder of a path, a Hub id (fetched into the Hub's cache), or something that the package ships.

    Raises:
        ArchitectureError: nothing is there.
    """
    if name.startswith(BUILTIN):
        folder = ASSETS / name.removeprefix(BUILTIN)
        if not folder.is_dir():
            shipped = ", ".join(f"{BUILTIN}{entry.name}" for entry in sorted(ASSETS.iterdir()))
            raise ArchitectureError(f"The package ships no {name}.", "", f"It ships: {shipped}.")
        return folder
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists():
        raise ArchitectureError(f"There is no {what} folder {name}.", "", f"Give the folder of a {what}, or a Hub id.")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArchitectureError(
            f"{name} is neither a folder here nor a {what} that the Hub gives.",
            reason,
            "Check the name and the network; log in with `hf auth login` if it is private or gated.",
        ) from error


def _read_config(folder: Path, name: str) -> PretrainedConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ArchitectureError(
            f"{name} is no checkpoint.", f"There is no config.json in {folder}.", "Use another folder."
        )
    try:
        said = json.loads(file.read_text())
    except ValueError as error:
        raise ArchitectureError(f"{file} is not JSON.", f"{error}.", "Fetch the checkpoint again.") from error
    model_type = said.get("model_type") if isinstance(said, dict) else None
    if model_type is None:
        raise ArchitectureError(f"{name} is no checkpoint.", f"{file} names no model_type.", "Use another folder.")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), n=3)
        raise ArchitectureError(
            f"The architecture {model_type!r} of {name} is not known.",
            f"Near it are: {', '.join(near)}." if near else "Nothing in transformers is called like it.",
            "Use a checkpoint that transformers loads by itself, or update transformers.",
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ArchitectureError(
            f"{name} ({model_type}) is no causal language model.",
            "A memory is attached to decoder-only language models.",
            "Use a checkpoint such as Qwen3, Llama or SmolLM3.",
        )
    config = AutoConfig.from_pretrained(folder)
    # Encoders are in the table of causal language models too, as decoders to be: what is on disk decides.
    head = (getattr(config, "architectures", None) or [""])[0]
    if head and not head.endswith(("ForCausalLM", "LMHeadModel")):
        raise ArchitectureError(
            f"{name} ({model_type}) is no causal language model.",
            f"Its checkpoint was made for {head}.",
            "Use a checkpoint such as Qwen3, Llama or SmolLM3.",
        )
    return config
