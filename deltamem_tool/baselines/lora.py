"""LoRAs of PEFT on a base model: create one to train, create one of the memory's size to measure, or load a saved one.

`training.baseline_steps.LoraStepModel` trains one.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from deltamem_tool._compat import peft_model
from deltamem_tool.base_model.attention import attention_layers
from deltamem_tool.base_model.layouts import features
from deltamem_tool.errors import AdapterError, ArchitectureError, ConfigError, HubError, first_line
from deltamem_tool.io.formats import PEFT_CONFIG_FILE
from deltamem_tool.io.names import BUILTIN, hub_name, resolve_folder
from deltamem_tool.io.safe_json import read_json
from deltamem_tool.recipe.load import LoraOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltamem_tool.memory.adapter import DeltaMemAdapter

CONFIG_FILE, WEIGHTS_FILE = PEFT_CONFIG_FILE, "adapter_model.safetensors"  # PEFT's names
BRANCHES = ("q", "o")  # projections with a LoRA of the memory's size, as for the paper's memory
RANDOM_STD = 0.02  # of weights that PEFT initialises to zero, because a product with zeros might be optimised away
_AGAIN = "Train it again with `deltamem train` and a recipe with a `lora:` section."


def new_lora(base: PreTrainedModel, options: LoraOptions, name: str | None = None, revision: str | None = None) -> Any:
    """Put a new LoRA on `base`, whose own weights are frozen.

    Args:
        base: the base model, changed in place.
        options: rank, alpha, dropout and target modules.
        name: name of the base model in the saved config, instead of its path on this machine.
        revision: revision of the base model on the Hub.

    Returns:
        The `peft.PeftModel`.

    Raises:
        ConfigError: PEFT is not installed, or the model has none of the target modules.
    """
    config = _peft().LoraConfig(
        r=options.rank,
        lora_alpha=cast(int, options.alpha),  # may be a float, although its type is int
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
        task_type="CAUSAL_LM",
    )
    try:
        model = peft_model(base, config)
    except ValueError as error:
        raise ConfigError(
            "The LoRA does not fit the model.", f"{first_line(error)}.", "Correct lora.targets."
        ) from error
    config.base_model_name_or_path, config.revision = name, revision
    return model


def random_lora(model: PreTrainedModel, adapter: DeltaMemAdapter, seed: int) -> Any:
    """Put a LoRA with random weights, of about as many parameters as the memory, on the memory's layers.

    Raises:
        ConfigError: PEFT is not installed, or cannot change these layers.
    """
    layers = [layer for layer in attention_layers(model) if layer.index in adapter.layer_indices]
    linears = {
        layer.projection(branch).name: layer.projection(branch).linear for layer in layers for branch in BRANCHES
    }
    of_rank_one = sum(sum(features(linear)) for linear in linears.values())
    parameters = sum(parameter.numel() for parameter in adapter.parameters())
    rank = max(1, round(parameters / of_rank_one))
    generator = torch.Generator().manual_seed(seed)
    with without_warnings():
        lora = new_lora(model, LoraOptions(rank=rank, targets=tuple(linears)))
    with torch.no_grad():
        for parameter in _lora_weights(lora):
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float32, generator=generator) * RANDOM_STD)
    return _in_dtype_of_base(lora)


def lora_parameters(lora: Any) -> int:
    """Return the number of parameters of a `PeftModel`'s LoRA."""
    return sum(parameter.numel() for parameter in _lora_weights(lora))


def import_peft() -> None:
    """Import everything that creating a LoRA needs. PEFT imports more for every kind of layer when it creates one."""
    with without_warnings():
        peft = _peft()
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(1, 1)))


@dataclass(frozen=True)
class Lora:
    """A saved LoRA: a folder of `deltamem train` with a `lora:` section, or of PEFT's `save_pretrained`.

    Attributes:
        folder: folder with its files.
        base: folder or Hub id of the model that it was trained on; None if the config has none.
        revision: revision of that model on the Hub.
    """

    folder: Path
    base: str | None
    revision: str | None

    @classmethod
    def read(cls, name: str | Path) -> Lora:
        """Read the config of a folder or Hub id; the weights are read by `attach_to`.

        Raises:
            AdapterError: a file is missing or damaged, or it is another kind of PEFT adapter.
            HubError: there is no such folder, or the Hub does not have it.
        """
        folder = resolve_folder(str(name), None, [CONFIG_FILE, WEIGHTS_FILE], "LoRA")
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / file).is_file():
                raise AdapterError(f"{folder} is not a LoRA folder.", f"It has no {file}.", _AGAIN)
        try:
            config = read_json(folder / CONFIG_FILE)
        except ValueError as error:
            raise AdapterError(f"{folder / CONFIG_FILE} is not JSON.", f"{error}.", _AGAIN) from error
        kind = config.get("peft_type") if isinstance(config, dict) else None
        if kind != "LORA":
            raise AdapterError(f"{folder} is not a LoRA.", f"Its peft_type is {kind!r}.", "Use a LoRA.")
        return cls(folder, config.get("base_model_name_or_path"), config.get("revision"))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of its config and its weights."""
        digest = hashlib.sha256()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with (self.folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def check_base_name(self, names: Sequence[str]) -> None:
        """Compare the base model by name only, before it is loaded.

        Paths are not compared, since they mean nothing on another machine.

        Raises:
            AdapterError: it names a public model that is not in `names`.
        """
        public = isinstance(self.base, str) and names and all(map(_is_public, (self.base, *names)))
        if public and self.base not in names:
            raise AdapterError(
                f"{self.folder} was made for another base model.",
                f"It was made for {self.base}, and this is {names[0]}.",
                "Use a LoRA of the same base model.",
            )

    def check_base(self, model: PreTrainedModel) -> None:
        """Compare the base model by the fingerprint of its weights.

        Raises:
            AdapterError: it was trained on a model other than the base of `model`, or does not name its base model.
        """
        from deltamem_tool.adapter.find_base import base_of, base_of_model
        from deltamem_tool.base_model.checkpoint import BaseCheckpoint

        base = base_of_model(model)
        if not self.base:
            raise AdapterError(
                f"{self.folder} does not say which model it was trained on.",
                f"{CONFIG_FILE} has no base_model_name_or_path.",
                f"Add it, with the name of the base model: {base.name}, if it was trained on that one.",
            )
        if (self.base, self.revision) == (base.name, base.revision):
            return
        try:
            trained_on = base_of(BaseCheckpoint(self.base, self.revision))
        except (ArchitectureError, HubError) as error:
            raise AdapterError(
                f"The base model of {self.folder} cannot be compared with the adapter's.",
                error.what,
                f"Correct base_model_name_or_path in {CONFIG_FILE}.",
            ) from error
        if (trained_on.model_type, trained_on.fingerprint) != (base.model_type, base.fingerprint):
            raise AdapterError(
                f"{self.folder} was trained on another base model.",
                f"It was trained on {self.base} ({trained_on.model_type}, weights {trained_on.fingerprint[:12]}…); "
                f"the adapter's is {base.name} ({base.model_type}, weights {base.fingerprint[:12]}…).",
                "Use a LoRA of the same base model.",
            )

    @contextmanager
    def applied_to(self, model: PreTrainedModel) -> Iterator[None]:
        """Put the LoRA on `model` inside the block. Afterwards, the model is as before.

        Raises:
            AdapterError: the weights are damaged, or do not fit the model.
            ConfigError: PEFT is not installed.
        """
        required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            wrapped = self.attach_to(model)
            try:
                yield
            finally:
                wrapped.unload()
        finally:
            for parameter, required in required_grad:
                parameter.requires_grad_(required)

    def attach_to(self, model: PreTrainedModel) -> Any:
        """Put the LoRA on `model`, whose layers are changed in place.

        Returns:
            The `PeftModel`, in eval mode.

        Raises:
            AdapterError: the weights are damaged, or do not fit the model, which is then unchanged. Missing and
                extra tensors are named.
            ConfigError: PEFT is not installed.
        """
        config = _peft().LoraConfig.from_pretrained(str(self.folder))
        config.inference_mode = True
        config.base_model_name_or_path = None  # PEFT would warn about the path; `check_base` has checked the model
        try:
            wrapped = peft_model(model, config)
        except ValueError as error:
            raise self._misfit_error(f"{first_line(error)}.") from error
        try:
            self._load_weights(wrapped)
        except BaseException:
            wrapped.unload()
            raise
        return wrapped.eval()

    def for_inference(self, model: PreTrainedModel) -> Any:
        """Do what `attach_to` does, and freeze the LoRA and cast it to the data type of the base model."""
        with without_warnings():
            return _in_dtype_of_base(self.attach_to(model))

    def _load_weights(self, wrapped: Any) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(self.folder / WEIGHTS_FILE)
        except SafetensorError as error:
            raise AdapterError(f"{self.folder / WEIGHTS_FILE} is damaged.", f"{error}.", _AGAIN) from error
        with without_warnings():  # about the missing config.json of a base in a GGUF file
            expected = {name: weight.shape for name, weight in _peft().get_peft_model_state_dict(wrapped).items()}
        shapes = {name: weight.shape for name, weight in weights.items()}
        if expected != shapes:
            names = sorted(expected.keys() | shapes.keys())
            differing = [name for name in names if expected.get(name) != shapes.get(name)]
            raise self._misfit_error(f"These tensors are missing, extra or have another shape: {', '.join(differing)}.")
        _peft().set_peft_model_state_dict(wrapped, weights)

    def _misfit_error(self, why: str) -> AdapterError:
        return AdapterError(f"{self.folder} does not fit the model.", why, "Use a LoRA of the same base model.")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("A LoRA needs PEFT.", f"{error}.", "pip install 'deltamem-tool[train]'") from error
    return peft


def _is_public(name: str) -> bool:
    """Return whether `name` is a Hub id or a built-in name, not a path on this machine."""
    return name.startswith(BUILTIN) or hub_name(name) is not None


def _lora_weights(lora: Any) -> Iterator[Tensor]:
    return (parameter for name, parameter in lora.named_parameters() if "lora_" in name)


def _in_dtype_of_base(lora: Any) -> Any:
    """Cast a LoRA to the data type of its base. PEFT keeps it in float32 for training, and casts in every call."""
    for parameter in _lora_weights(lora):
        parameter.data = parameter.data.to(lora.get_base_model().dtype)
    return lora.requires_grad_(False)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Hide PEFT's warnings, such as those about its use of transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
