"""Adapters and their base models: the folder is written whole, and loaded onto the model it was made for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool import __version__
from deltamem_tool._compat import commit_of_config
from deltamem_tool.adapter_config import CONFIG_FILE, FORMAT, FORMAT_VERSION, WEIGHTS_FILE, BaseModel
from deltamem_tool.adapter_folder import AdapterFolder, describe_adapter, read_adapter, with_tensors
from deltamem_tool.adapter_module import DeltaMemAdapter
from deltamem_tool.architectures import attention_layers, select_layers
from deltamem_tool.checkpoint import BaseCheckpoint, fingerprint
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import AdapterError, ArchitectureError, HubError
from deltamem_tool.files import folder_whole, refuse_existing
from deltamem_tool.patched import hf_model
from deltamem_tool.surgery import adapter_of, fresh_adapter, hook


def create_adapter(
    base: str,
    config: DeltaMemConfig,
    out: str | Path,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> AdapterFolder:
    """Write a fresh adapter for the checkpoint `base`, without loading it: a few columns of its weights are read.

    Python files of `base` run only where `trust_remote_code` says so.

    Raises:
        ArchitectureError: `base` cannot take a memory.
        ConfigError: the options do not fit it.
        DeltaMemError: `out` is there already, or cannot be written.
    """
    refuse_existing(out, overwrite)
    checkpoint = BaseCheckpoint(base, revision, trust_remote_code)
    layers = select_layers(checkpoint.layers, config)
    adapter = fresh_adapter(config, layers, checkpoint.first_columns)
    write_adapter(adapter, base_of(checkpoint), out, overwrite)
    return read_adapter(out)


def save_adapter(
    model: PreTrainedModel, path: str | Path, overwrite: bool = False, files: Mapping[str, bytes] | None = None
) -> None:
    """Write the adapter of a patched `model` as a folder, whole or not at all, with `files` beside it."""
    write_adapter(adapter_of(model), base_of_model(hf_model(model)), path, overwrite, files=files)


def load(
    path: str | Path,
    base: str | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """The base model with the adapter on it, in eval mode.

    Args:
        path: adapter folder or Hub id; `revision` is its revision.
        base: where the base model is, if not where the adapter says.
        base_revision: of the base model on the Hub; by default the recorded one, where `base` is the recorded one too.
        trust_remote_code: whether Python files of the base model may run.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        AdapterError: the adapter is damaged or was made for another base model.
        ArchitectureError: the base model cannot be loaded.
        HubError: it is not there.
    """
    described = describe_adapter(path, revision)
    checkpoint, found = find_base(path, described.base, base, base_revision, trust_remote_code)
    with torch.device("meta"):
        expected = DeltaMemAdapter(described.config, select_layers(checkpoint.layers, described.config))
    _refuse_misfit(expected, described)
    folder = with_tensors(described)
    model = checkpoint.load(**kwargs)
    adapter = DeltaMemAdapter(folder.config, select_layers(attention_layers(model), folder.config))
    fill(adapter, folder)
    adapter.made_for = found
    hook(model, adapter)
    return model.eval()


def find_base(
    adapter: str | Path,
    recorded: BaseModel,
    base: str | None = None,
    base_revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[BaseCheckpoint, BaseModel]:
    """The base model that `adapter` was made for, at `base` or where it has been recorded.

    Raises:
        AdapterError: it is not said where, or another model is there.
        HubError: no model is there.
    """
    if not (base or recorded.name):
        raise AdapterError(
            f"{adapter} does not say where its base model is.",
            "That model had not been saved when the adapter was.",
            "Pass base=, or --base on the command line.",
        )
    if base_revision is None and base in (None, recorded.name):
        base_revision = recorded.revision
    checkpoint = BaseCheckpoint(base or recorded.name, base_revision, trust_remote_code)
    found = base_of(checkpoint)
    if (found.model_type, found.fingerprint) != (recorded.model_type, recorded.fingerprint):
        raise AdapterError(
            f"{adapter} was made for another base model.",
            f"It was made for {recorded.name} ({recorded.model_type}, weights {recorded.fingerprint[:12]}…); "
            f"{checkpoint.name} is {found.model_type}, weights {found.fingerprint[:12]}….",
            "Pass the base model it was made for.",
        )
    return checkpoint, found


def tokenizer_of(model: PreTrainedModel, *, for_chat: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a loaded model's base, as `read_tokenizer` has it."""
    return read_tokenizer(model.name_or_path or "", for_chat=for_chat)


def read_tokenizer(folder: str | Path, *, for_chat: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer in a base model's folder; `for_chat`, it must have a chat template. Python files there do not run.

    Raises:
        ArchitectureError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # or it asks on the terminal
    except (OSError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArchitectureError(f"{folder} has no tokenizer.", why, "Save the model's tokenizer beside it.") from error
    if for_chat and tokenizer.chat_template is None:
        raise ArchitectureError(
            f"The tokenizer of {folder} has no chat template.", "", "Use the base model's chat or instruct version."
        )
    return tokenizer


def fill(adapter: DeltaMemAdapter, folder: AdapterFolder) -> None:
    """Load the folder's weights into `adapter`.

    Raises:
        AdapterError: tensors are missing, extra or misshapen for this base model; all of them are named.
    """
    _refuse_misfit(adapter, folder)
    adapter.load_state_dict(dict(folder.tensors))


def _refuse_misfit(adapter: DeltaMemAdapter, folder: AdapterFolder) -> None:
    folder.refuse(folder.differences({name: tensor.shape for name, tensor in adapter.state_dict().items()}))


def write_adapter(
    adapter: DeltaMemAdapter,
    base: BaseModel,
    out: str | Path,
    overwrite: bool,
    reference: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the folder; `reference` goes into its config as it is, for the way back to the reference's format, and
    `files` lie beside."""
    said: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "mechanism": adapter.config.to_dict(),
        "base": asdict(base),
        "deltamem_version": __version__,
    }
    if reference is not None:
        said["reference"] = reference
    broken = [name for name, tensor in adapter.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise AdapterError(
            "The adapter holds NaN or infinity.",
            f"{', '.join(broken)}; nothing was written.",
            "Train anew with a lower learning rate.",
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    if base.name and Path(base.name).is_dir() and Path(base.name).resolve() == Path(out).resolve():
        raise AdapterError(f"{out} is the base model itself.", "It would be replaced.", "Choose another folder.")
    with folder_whole(out, overwrite) as staged:
        (staged / CONFIG_FILE).write_text(json.dumps(said, indent=2) + "\n")
        (staged / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))
        for name, content in (files or {}).items():
            (staged / name).write_bytes(content)


def base_of(checkpoint: BaseCheckpoint) -> BaseModel:
    mark = checkpoint.fingerprint(checkpoint.layers)  # all of them, whichever have a memory
    return BaseModel(checkpoint.name, checkpoint.revision, checkpoint.config.model_type, mark)


def base_of_model(model: PreTrainedModel) -> BaseModel:
    """The base of a model in memory: as loaded, else from the checkpoint that it names, else from its own weights."""
    known = adapter_of(model).made_for
    if isinstance(known, BaseModel):
        return known
    name = model.name_or_path or ""
    if name:
        try:
            # A model of remote code is here, so its code has been trusted.
            trusted = model.is_custom_code()
            return base_of(BaseCheckpoint(name, commit_of_config(model.config), trusted))
        except (ArchitectureError, HubError):
            pass  # the checkpoint is gone
    mark = fingerprint(attention_layers(model), lambda layer: layer.projection("q").weight.detach()[:1])
    return BaseModel(name, None, model.config.model_type, mark)
