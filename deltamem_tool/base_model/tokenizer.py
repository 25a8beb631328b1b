"""The tokenizer of a base model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool.base_model.gguf import pretrained_arguments, source_of
from deltamem_tool.errors import ArchitectureError, first_line
from deltamem_tool.segments.messages import BYTE_ORDER_MARK


def tokenizer_of(model: PreTrainedModel, *, for_chat: bool = True) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a loaded model, as `read_tokenizer` does."""
    return read_tokenizer(source_of(model), for_chat=for_chat)


def read_tokenizer(folder: str | Path, *, for_chat: bool = True) -> PreTrainedTokenizerBase:
    """Read the tokenizer in a base model's folder or GGUF file. With `for_chat`, it must have a chat template.

    Python files in the folder do not run.

    Raises:
        ArchitectureError: there is no tokenizer, or the tokenizer has no chat template.
    """
    try:
        # Without trust_remote_code, transformers would ask on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(**pretrained_arguments(folder), trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises plain Exceptions
        raise ArchitectureError(
            f"{folder} has no tokenizer that can be read.",
            f"{first_line(error)}.",
            "Save the model's tokenizer beside it.",
        ) from error
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = tokenizer.chat_template.removeprefix(BYTE_ORDER_MARK)
    if for_chat and tokenizer.chat_template is None:
        raise ArchitectureError(
            f"The tokenizer of {folder} has no chat template.",
            "It is needed to turn messages into tokens.",
            "Use the base model's chat or instruct version.",
        )
    return tokenizer
