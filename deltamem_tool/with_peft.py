"""PEFT puts a LoRA on a model: the one call of it that both training and evaluation make."""

from __future__ import annotations

import warnings
from typing import Any


def peft_model(model: Any, config: Any) -> Any:
    """`peft.get_peft_model`, which changes `model` in place.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the config does not fit the model.
    """
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT 0.21 asks a model of transformers 5 for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)
