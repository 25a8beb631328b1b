"""Where a patched model keeps what `attach` has put on it: all that a state has to know of `surgery`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from deltamem_tool.errors import ArchitectureError

PATCH = "_deltamem_patch"  # the attribute of the model


def patch_of(model: PreTrainedModel) -> Any:
    """The `surgery.Patch` of a patched model.

    Raises:
        ArchitectureError: it has none.
    """
    patch = getattr(model, PATCH, None)
    if patch is None:
        raise ArchitectureError(
            "This model has no memory.", "", "Call deltamem.attach(model) or deltamem.load(...) first."
        )
    return patch
