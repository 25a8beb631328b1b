"""The LoRA baseline, evaluated: one of PEFT on the base model, put on for a question and taken off again.

`training.lora` trains it, `bench.loras` measures what it costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamem_tool._compat import peft_model
from deltamem_tool.errors import AdapterError, ArchitectureError, ConfigError, HubError, first_line
from deltamem_tool.io.safe_json import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
_AGAIN = "Train it again with `deltamem train` and a recipe with a `lora:` section."


@dataclass(frozen=True)
class Lora:
    """A folder as `deltamem train` writes it for a recipe with a `lora:` section, or PEFT's `save_pretrained`."""

    folder: Path
    base: str | None  # folder or Hub id of the model that it was trained on, and its revision
    revision: str | None

    @classmethod
    def read(cls, folder: Path) -> Lora:
        """What its config says; the weights are read when it is put on.

        Raises:
            AdapterError: a file is missing or damaged, or it is another kind of PEFT's adapters.
        """
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise AdapterError(f"{folder} is no folder of a LoRA.", f"It has no {name}.", _AGAIN)
        try:
            said = read_json(folder / CONFIG_FILE)
        except ValueError as error:
            raise AdapterError(f"{folder / CONFIG_FILE} is not JSON.", f"{error}.", _AGAIN) from error
        kind = said.get("peft_type") if isinstance(said, dict) else None
        if kind != "LORA":
            raise AdapterError(f"{folder} is no LoRA.", f"Its peft_type is {kind!r}.", "Use a LoRA.")
        return cls(folder, said.get("base_model_name_or_path"), said.get("revision"))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over its config and its weights."""
        digest = hashlib.sha256()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with (self.folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def refuse_other_base(self, model: PreTrainedModel) -> None:
        """
        Raises:
            AdapterError: it was trained on another model than the base of `model`, or it cannot be seen on which.
        """
        from deltamem_tool.adapter.find_base import base_of, base_of_model
        from deltamem_tool.base_model.checkpoint import BaseCheckpoint

        base = base_of_model(model)
        if not self.base:
            raise AdapterError(
                f"{self.folder} does not say which model it was trained on.",
                f"{CONFIG_FILE} has no base_model_name_or_path.",
                f"Write the name of its base into it: {base.name}, if it is that.",
            )
        if (self.base, self.revision) == (base.name, base.revision):
            return
        try:
            own = base_of(BaseCheckpoint(self.base, self.revision))
        except (ArchitectureError, HubError) as error:
            raise AdapterError(
                f"The base model of {self.folder} cannot be compared with the memory's.",
                f"{error.what}",
                f"Correct base_model_name_or_path in {CONFIG_FILE}.",
            ) from error
        if (own.model_type, own.fingerprint) != (base.model_type, base.fingerprint):
            raise AdapterError(
                f"{self.folder} was trained on another base model.",
                f"It was trained on {self.base} ({own.model_type}, weights {own.fingerprint[:12]}…); the memory's is "
                f"{base.name} ({base.model_type}, weights {base.fingerprint[:12]}…).",
                "Use a LoRA of the same base.",
            )

    @contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside the block `model`, which has no memory then, computes with the LoRA; afterwards it is what it was.

        Raises:
            AdapterError, ConfigError: as `put_on`.
        """
        required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            wrapped = self.put_on(model)
            try:
                yield
            finally:
                wrapped.unload()
        finally:
            for parameter, required in required_grad:
                parameter.requires_grad_(required)

    def put_on(self, model: PreTrainedModel) -> Any:
        """The `PeftModel` of `model`, whose layers are changed in place, in eval mode.

        Raises:
            AdapterError: the weights do not fit the model, which is as it was then; all tensors that are missing or
                extra are named.
            ConfigError: PEFT is not installed.
        """
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ConfigError("A LoRA needs PEFT.", f"{error}.", "pip install 'deltamem-tool[train]'") from error
        config = LoraConfig.from_pretrained(str(self.folder))
        config.inference_mode = True
        config.base_model_name_or_path = None  # or PEFT warns that the base is at another path: it has been compared
        try:
            wrapped = peft_model(model, config)
        except ValueError as error:
            raise self._misfit(f"{first_line(error)}.") from error
        try:
            self._fill(wrapped)
        except BaseException:
            wrapped.unload()
            raise
        return wrapped.eval()

    def _fill(self, wrapped: Any) -> None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(self.folder / WEIGHTS_FILE)
        except SafetensorError as error:
            raise AdapterError(f"{self.folder / WEIGHTS_FILE} is damaged.", f"{error}.", _AGAIN) from error
        wanted = {name: weight.shape for name, weight in get_peft_model_state_dict(wrapped).items()}
        found = {name: weight.shape for name, weight in weights.items()}
        if wanted != found:
            differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            raise self._misfit(f"Missing, extra or of another shape: {', '.join(differing)}.")
        set_peft_model_state_dict(wrapped, weights)

    def _misfit(self, why: str) -> AdapterError:
        return AdapterError(f"{self.folder} does not fit the model.", why, "Use a LoRA of the same base.")
