"""Record the base model of an adapter with its fingerprint, and find it again."""

from __future__ import annotations

import warnings
from pathlib import Path

from transformers import PreTrainedModel

from deltamem_tool._compat import commit_of_config
from deltamem_tool.adapter.config_file import BaseModel
from deltamem_tool.base_model.attention import attention_layers
from deltamem_tool.base_model.checkpoint import BaseCheckpoint, fingerprint
from deltamem_tool.base_model.difference import relative_difference
from deltamem_tool.base_model.gguf import source_of
from deltamem_tool.errors import AdapterError, ArchitectureError, DeltaMemError, HubError, OtherBaseWarning
from deltamem_tool.io.formats import MODEL_CONFIG_FILE
from deltamem_tool.io.names import check_revision, hub_name, is_cached
from deltamem_tool.memory.attach import adapter_of


def find_base(
    adapter: str | Path,
    recorded: BaseModel,
    base: str | None = None,
    base_revision: str | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
) -> tuple[BaseCheckpoint, BaseModel]:
    """Return the base model that `adapter` was made for, at `base` or at the recorded location.

    With `allow_other_base`, another model is accepted, such as the checkpoint that a GGUF file was quantised from. An
    `OtherBaseWarning` then says how much its weights differ from those of the recorded model.

    Raises:
        AdapterError: no location is known, or the model there is another one and is not allowed.
        HubError: there is no model at that location.
    """
    if not (base or recorded.name) and (Path(adapter) / MODEL_CONFIG_FILE).is_file():
        base = str(adapter)  # `save_pretrained` writes a base model that is not saved elsewhere beside its adapter
    if not (base or recorded.name):
        raise AdapterError(
            f"{adapter} does not say where its base model is.",
            "The base model had not been saved when the adapter was saved.",
            "Pass base=, or --base on the command line.",
        )
    check_revision(base or recorded.name or "", base_revision)
    if base_revision is None and base in (None, recorded.name):
        base_revision = recorded.revision
    checkpoint = BaseCheckpoint(base or recorded.name, base_revision, trust_remote_code)
    actual = base_of(checkpoint)
    if (actual.model_type, actual.fingerprint) != (recorded.model_type, recorded.fingerprint):
        why = (
            f"It was made for {recorded.name} ({recorded.model_type}, weights {recorded.fingerprint[:12]}…); "
            f"{checkpoint.name} is {actual.model_type}, weights {actual.fingerprint[:12]}…."
        )
        difference = _difference(recorded, checkpoint, may_fetch=allow_other_base)
        if not allow_other_base:
            raise AdapterError(
                f"{adapter} was made for another base model.",
                f"{why} {difference}".strip(),
                "Pass the base model it was made for, or allow this one: --allow-other-base (allow_other_base=True).",
            )
        warnings.warn(f"{adapter} runs on another base model. {why} {difference}", OtherBaseWarning, stacklevel=3)
    return checkpoint, actual


def _difference(recorded: BaseModel, checkpoint: BaseCheckpoint, may_fetch: bool) -> str:
    """Describe how much `checkpoint` differs from the recorded base; "" if the recorded base is not available.

    Args:
        recorded: the base that the adapter was made for.
        checkpoint: the other base.
        may_fetch: whether the recorded base may be fetched from the Hub.
    """
    try:
        hub = hub_name(recorded.name, recorded.revision)
        if not recorded.name or (hub is not None and not may_fetch and not is_cached(hub)):
            return ""
        share = relative_difference(BaseCheckpoint(recorded.name, recorded.revision), checkpoint)
    except DeltaMemError as error:
        return f"How far apart they are is not known: {error.what}"
    if share is None:
        return "Their attention layers have other shapes."
    return f"The weights of their attention differ by {share:.2%} (root mean square)."


def base_of(checkpoint: BaseCheckpoint) -> BaseModel:
    """Return what an adapter folder records of its base model."""
    mark = checkpoint.fingerprint(checkpoint.layers)  # of all layers, with or without a memory
    return BaseModel(checkpoint.name, checkpoint.revision, checkpoint.config.model_type, mark)


def base_of_model(model: PreTrainedModel) -> BaseModel:
    """Return the base of a loaded model: as recorded, else from the checkpoint it names, else from its weights."""
    recorded = adapter_of(model).made_for
    if isinstance(recorded, BaseModel):
        return recorded
    name = source_of(model)
    if name:
        try:
            # A model with remote code is loaded, so its code is trusted.
            trusted = model.is_custom_code()
            return base_of(BaseCheckpoint(name, commit_of_config(model.config), trusted))
        except (ArchitectureError, HubError):
            pass  # the checkpoint is gone
    mark = fingerprint(attention_layers(model), lambda layer: layer.projection("q").weight.detach()[:1])
    return BaseModel(name, None, model.config.model_type, mark)
