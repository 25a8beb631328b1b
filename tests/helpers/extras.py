"""Modules of the package that need an extra."""

from __future__ import annotations

import importlib.util

_NEED = {"deltamem_tool.evaluation.harness_model": "lm_eval", "deltamem_tool.serve.ray_app": "ray"}


def lacks_extra(module: str) -> bool:
    """Whether the extra that `module` needs is missing."""
    return module in _NEED and importlib.util.find_spec(_NEED[module]) is None
