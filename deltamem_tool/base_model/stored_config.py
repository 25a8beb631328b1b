"""Read the config of a base checkpoint, from `config.json` or a GGUF file, and check that it is a language model."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from deltamem_tool._compat import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    cached_gguf_reader,
)
from deltamem_tool.base_model.gguf import GgufFile, pretrained_arguments
from deltamem_tool.errors import ArchitectureError, first_line
from deltamem_tool.io.formats import MODEL_CONFIG_FILE, PEFT_CONFIG_FILE
from deltamem_tool.io.safe_json import read_json

DECODERS = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
_INVALID = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, StrictDataclassError)


def read_config(folder: Path, name: str, trust_remote_code: bool) -> PretrainedConfig:
    """Read the config of a folder of `save_pretrained`; error messages call the folder `name`.

    Raises:
        ArchitectureError: the config is missing or damaged, is not that of a causal language model, or needs code that
            is not trusted.
    """
    stored = _config_on_disk(folder, name)
    model_type = stored.get("model_type")
    remote_code = isinstance(stored.get("auto_map"), dict)
    if not isinstance(model_type, str):
        raise ArchitectureError(
            f"{name} is not a checkpoint.", f"{folder / 'config.json'} has no model_type.", "Use another folder."
        )
    if model_type not in CONFIG_MAPPING and not remote_code:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=3)
        raise ArchitectureError(
            f"The architecture {model_type!r} of {name} is not known.",
            f"Similar ones are {', '.join(near)}." if near else "No architecture of transformers has a similar name.",
            "Use a checkpoint that transformers loads by itself, or update transformers.",
        )
    if remote_code and not trust_remote_code and model_type not in CONFIG_MAPPING:
        raise ArchitectureError(
            f"The architecture {model_type!r} of {name} is defined by Python code in the checkpoint.",
            "That code could do anything on this machine; none of it has run.",
            f"Read it in {folder}, then pass --trust-remote-code (in Python trust_remote_code=True).",
        )
    causal = "AutoModelForCausalLM" in stored["auto_map"] if remote_code else False
    if not causal:
        _check_causal(model_type, name)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _INVALID as error:
        raise ArchitectureError(
            f"transformers cannot read {folder / 'config.json'}.",
            f"{first_line(error)}.",
            "Fetch the checkpoint again.",
        ) from error
    # transformers also lists encoders as causal language models, so the stored architecture decides.
    head = (getattr(config, "architectures", None) or [""])[0]
    usual = (DECODERS.get(model_type), "ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if head and not causal and not head.endswith(tuple(filter(None, usual))):
        raise ArchitectureError(
            f"{name} ({model_type}) is not a causal language model.",
            f"Its checkpoint was made for {head}.",
            "Use a checkpoint such as Qwen3, Llama or SmolLM3.",
        )
    return config


def read_gguf_config(file: GgufFile) -> PretrainedConfig:
    """Return the config that transformers builds from a GGUF file.

    Raises:
        ArchitectureError: transformers does not know its architecture, or it is not a causal language model.
    """
    try:
        with cached_gguf_reader(file.reader):
            config: PretrainedConfig = AutoConfig.from_pretrained(**pretrained_arguments(file.path))
    except _INVALID as error:
        raise ArchitectureError(
            f"transformers cannot read the config of {file.name}.",
            f"{first_line(error)}.",
            "Use the model's original checkpoint: a folder of save_pretrained, or its Hub id.",
        ) from error
    _check_causal(config.model_type, file.name)
    return config


def _check_causal(model_type: str, name: str) -> None:
    if model_type not in DECODERS:
        raise ArchitectureError(
            f"{name} ({model_type}) is not a causal language model.",
            "A memory needs a decoder-only language model.",
            "Use a checkpoint such as Qwen3, Llama or SmolLM3.",
        )


def _config_on_disk(folder: Path, name: str) -> dict[str, Any]:
    """Read `config.json`.

    Raises:
        ArchitectureError: the file is missing or damaged; the error says what the folder is, if it is of another kind.
    """
    file = folder / MODEL_CONFIG_FILE
    if (folder / "model_index.json").is_file():
        raise ArchitectureError(
            f"{name} is a diffusion pipeline, not a causal language model.",
            f"There is a model_index.json in {folder}.",
            "Use a checkpoint such as Qwen3, Llama or SmolLM3.",
        )
    if not file.is_file() and (folder / PEFT_CONFIG_FILE).is_file():
        raise ArchitectureError(
            f"{name} is a PEFT adapter, not a checkpoint.",
            f"There is an {PEFT_CONFIG_FILE} in {folder}, and no {MODEL_CONFIG_FILE}.",
            "Use its base model. In Python, you can call deltamem.attach on a model with the PEFT adapter.",
        )
    if not file.is_file():
        raise ArchitectureError(
            f"{name} is not a checkpoint.",
            f"There is no {MODEL_CONFIG_FILE} in {folder}.",
            "Use another folder; a GGUF file on the Hub is named OWNER/NAME:FILE.gguf.",
        )
    try:
        config = read_json(file, finite=False)  # transformers writes Infinity
    except ValueError as error:
        raise ArchitectureError(f"{file} is not JSON.", f"{error}.", "Fetch the checkpoint again.") from error
    if not isinstance(config, dict):
        raise ArchitectureError(f"{name} is not a checkpoint.", f"{file} has no model_type.", "Use another folder.")
    return config
