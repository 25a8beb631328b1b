"""Inspect a base checkpoint on disk without loading it: its config, its module tree, a few columns of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from deltamem_tool._compat import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    WeightConverter,
    WeightRenaming,
    cached_gguf_reader,
    get_model_conversion_mapping,
    rename_source_key,
)
from deltamem_tool.base_model import smollm2
from deltamem_tool.base_model.attention import AttentionLayer, attention_layers
from deltamem_tool.base_model.gguf import GgufFile, GgufWeights, check_complete, find_gguf, pretrained_arguments
from deltamem_tool.base_model.layouts import Projection, features
from deltamem_tool.base_model.stored_config import read_config, read_gguf_config
from deltamem_tool.base_model.weights import WEIGHT_FILES, StoredWeights, files_of_index
from deltamem_tool.errors import ArchitectureError, ConfigError, HubError, first_line
from deltamem_tool.io.names import commit_of, expand_name, fetch, hub_name, is_gguf, resolve_folder, short_name

if TYPE_CHECKING:
    from huggingface_hub import HfUri

SAMPLED = 64  # numbers of each query projection that enter the fingerprint
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fingerprint(layers: Iterable[AttentionLayer], first_row: Callable[[AttentionLayer], Tensor]) -> str:
    """Return the SHA-256 of a few numbers of every attention layer's query projection, as float32.

    Another model, or the same model after fine-tuning, has another fingerprint.

    Args:
        layers: all attention layers of a model.
        first_row: returns the first n numbers `[1, n]` of a layer's query weight.
    """
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(first_row(layer)[:, :SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()


class BaseCheckpoint:
    """A folder of `save_pretrained`, a GGUF file, or either on the Hub.

    The weights of a folder are fetched and opened when they are first needed.

    Args:
        name: folder, file or Hub id: see `io.names`.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether Python files of the checkpoint may run.

    Raises:
        ArchitectureError: it is not a causal language model, or it needs code that is not trusted.
        HubError: there is no such folder or repository, or the Hub cannot be reached.
        InstallationError: it is a GGUF file, and the package `gguf` is missing.

    Attributes:
        source: the folder, which has at least the config and the tokenizer, or the GGUF file.
    """

    def __init__(self, name: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
        name = expand_name(name)
        hub = hub_name(name, revision)
        file: Path | None
        if name == smollm2.BUILTIN_NAME:
            file, self.name = smollm2.fetch_gguf(), name
        elif hub is None:
            file = find_gguf(Path(name))
            self.name = str(file or name)
        else:
            file, self.name = _fetch_gguf(hub), short_name(hub)
        self.trust_remote_code = trust_remote_code
        self._is_here = hub is None
        self._gguf = None if file is None else GgufFile(file, self.name)
        if self._gguf is None:
            files = [*SMALL_FILES, "*.py"] if trust_remote_code else SMALL_FILES
            self.source = resolve_folder(name, revision, files, "checkpoint")
            self.config = read_config(self.source, self.name, trust_remote_code)
        else:
            self.source = self._gguf.path
            self.config = read_gguf_config(self._gguf)
        self.revision = commit_of(self.source)

    @cached_property
    def _whole(self) -> Path:
        """Return the folder or GGUF file after all of it has been fetched."""
        if not self._is_here and self._gguf is None:
            for file in WEIGHT_FILES:
                index = self.source / file
                wanted = [file]
                if file.endswith(".json"):  # a small file, which was fetched already if it exists
                    wanted = sorted(set(files_of_index(index).values())) if index.is_file() else []
                if wanted:
                    resolve_folder(self.name, self.revision, wanted, "checkpoint")
                    if (self.source / wanted[0]).is_file():
                        break
        return self.source

    @property
    def _kind(self) -> Any:
        """The model class: the text decoder alone if transformers has one, else the model with its vision towers."""
        causal = self.config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        is_causal_lm = self.config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        return AutoModelForCausalLM if causal or is_causal_lm else AutoModelForImageTextToText

    def skeleton(self) -> PreTrainedModel:
        """The model without weights (on torch's meta device): its module tree and shapes."""
        with torch.device("meta"):
            return self.from_config(self.config)

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        """The skeleton, kept because building that of a large model takes a second."""
        return self.skeleton()

    @cached_property
    def layers(self) -> list[AttentionLayer]:
        """The attention layers of the model without weights, as `attention_layers` finds them."""
        return attention_layers(self._skeleton)

    def from_config(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """Return a model of this kind with random weights, whose config may differ from the checkpoint's."""
        model: PreTrainedModel = self._kind.from_config(config, trust_remote_code=self.trust_remote_code, **options)
        return model

    @torch.inference_mode(False)  # tensors of that mode could not be used outside of it
    def load(self, **options: Any) -> PreTrainedModel:
        """Load the model as `AutoModelForCausalLM.from_pretrained` does, by default in the checkpoint's own dtype.

        Raises:
            ArchitectureError: transformers cannot load it, or would initialise missing weights with random numbers.
        """
        _ = self._weights  # its errors name damaged files; those of transformers do not
        options = {"dtype": "auto", **options, "trust_remote_code": self.trust_remote_code}
        if self._gguf is not None:
            options |= self._as_floats(options)
        try:
            with cached_gguf_reader(self._gguf.reader) if self._gguf else nullcontext():
                loaded: Any = self._kind.from_pretrained(
                    **pretrained_arguments(self._whole), **options, output_loading_info=True
                )
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError) or getattr(error, "errno", None) is not None:
                raise
            raise ArchitectureError(
                f"transformers cannot load {self.name}.",
                f"{first_line(error)}.",
                "Correct the checkpoint, or use another one.",
            ) from error
        model: PreTrainedModel = loaded[0]
        info: dict[str, Any] = loaded[1]
        missing = sorted(info["missing_keys"])
        if missing:
            raise ArchitectureError(
                f"{self.name} lacks {len(missing)} of its model's weights.",
                f"The first is {missing[0]}; they would be initialised with random numbers.",
                "Fetch the checkpoint again, or use another one.",
            )
        if self._gguf is not None:  # transformers names the folder, which may have others
            model.name_or_path = model.config.name_or_path = str(self.source)
        return model

    def _as_floats(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with which transformers loads a GGUF file as a plain model that can be trained and saved.

        Raises:
            ConfigError: the options ask for another quantisation, or for shards.
        """
        if options.get("distributed_config") is not None:
            raise ConfigError(
                f"{self.name} cannot be sharded on loading.",
                "transformers reads a GGUF file as a whole.",
                "Use the model's original checkpoint.",
            )
        if options.get("quantization_config") is not None:
            raise ConfigError(
                f"{self.name} cannot be quantised on loading.",
                "transformers does not quantise models from GGUF files.",
                "Load it without quantisation, or use the model's original checkpoint.",
            )
        return {"quantization_config": GgufConfig(dequantize=True), "config": self.config}

    def read(self, weight: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """Read a part of one weight matrix from disk, as stored. `weight` is its name in the model.

        Raises:
            ArchitectureError: the checkpoint lacks the weight, or its file cannot be read.
        """
        if weight in self._stored_as:
            return self._weights.read(self._stored_as[weight], rows, columns)
        if weight not in self._converted_weights:
            raise ArchitectureError(
                f"{self.name} has no weight {weight!r}.", "The checkpoint is incomplete.", "Use another checkpoint."
            )
        return self._converted_weights[weight][rows, columns]

    def first_columns(self, projection: Projection, count: int) -> Tensor:
        """Return the first columns `[out, count]` of a projection's weight `[out, in]`.

        Raises:
            ConfigError: the weight is quantised.
        """
        if not self._is_plain(projection):
            raise ConfigError(
                f"The weights of {self.name} are quantised.",
                "delta_init=base_slice copies columns of weights that are not quantised.",
                "Use delta_init zero or random, or the checkpoint from before quantisation.",
            )
        some = slice(0, count)
        if projection.is_transposed:
            return projection.take(self.read(projection.weight_name, rows=some)).T
        return projection.take(self.read(projection.weight_name, columns=some).T).T

    def fingerprint(self, layers: Iterable[AttentionLayer]) -> str:
        """Return the fingerprint of these layers, of which only a few numbers are read."""
        return fingerprint(layers, lambda layer: self._first_row(layer.projection("q")))

    def _first_row(self, projection: Projection) -> Tensor:
        some = slice(0, SAMPLED)
        if self._is_plain(projection):
            return self.read(projection.weight_name, slice(0, 1), some)
        # Several tensors, and packed integers that do not fit into a float32: the bytes of a hash stand for them.
        digest = hashlib.sha256()
        for part in self._parts(projection):
            numbers = self._weights.read(part, some, some).flatten()[:SAMPLED]
            digest.update(numbers.view(torch.uint8).numpy().tobytes())
        return torch.tensor([list(digest.digest())])

    def _is_plain(self, projection: Projection) -> bool:
        """Return whether the weight of a module is stored without quantisation."""
        if not getattr(self.config, "quantization_config", None):
            return True
        stored = self._stored_as.get(projection.weight_name)
        if stored is None:
            return not self._parts(projection)  # it is missing, which raises an error when it is read
        shape = list(features(projection.linear))
        shape = shape if projection.is_transposed else shape[::-1]
        return self._weights.shape(stored) == shape and self._weights.read(stored, slice(0, 1)).dtype in _FLOATS

    def _parts(self, projection: Projection) -> list[str]:
        """Return the names of all stored tensors of a linear layer; a quantised one has several, such as `scales`."""
        return sorted(stored for name, stored in self._stored_as.items() if name.startswith(f"{projection.name}."))

    @cached_property
    def _weights(self) -> StoredWeights | GgufWeights:
        if self._gguf is not None:
            return GgufWeights(self._gguf, self._skeleton)
        return StoredWeights(self._whole, self.name)

    @cached_property
    def _stored_as(self) -> dict[str, str]:
        """The name on disk of each weight of the model. Older checkpoints have other names, or lack a prefix."""
        if self._gguf is not None:
            return {name: name for name in self._weights.names}
        model = self._skeleton
        parameters = model.state_dict()
        changes = get_model_conversion_mapping(model)
        renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        converters = [change for change in changes if isinstance(change, WeightConverter)]
        stored: dict[str, str] = {}
        for name in self._weights.names:
            renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
            if converted is None:
                stored[renamed] = name
            elif name in parameters:
                stored[name] = name
        return stored

    @cached_property
    def _converted_weights(self) -> dict[str, Tensor]:
        """The weights that transformers builds from ones stored in another arrangement.

        This loads the whole model.
        """
        return self.load(dtype="auto").state_dict()


def _fetch_gguf(hub: HfUri) -> Path | None:
    """Return the file of `OWNER/NAME:FILE.gguf`, fetched if it is not in the Hub's cache; None for any other name.

    Raises:
        ArchitectureError: the file is one of several parts of a model.
        HubError: the repository or the file does not exist, or the Hub cannot be reached.
    """
    if not is_gguf(hub.path_in_repo):
        return None
    check_complete(hub.path_in_repo)
    file = fetch(replace(hub, path_in_repo=""), [hub.path_in_repo], "checkpoint") / hub.path_in_repo
    if not file.is_file():
        raise HubError(
            f"{hub.id} has no file {hub.path_in_repo}.",
            "The repository exists, but the file does not.",
            f"See https://huggingface.co/{hub.id}/tree/main for its files.",
        )
    return file
