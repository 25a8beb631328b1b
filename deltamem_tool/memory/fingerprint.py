"""What a memory is bound to: the mechanism and the weights of the adapter that wrote it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.config import DeltaMemConfig


def fingerprint_of(config: DeltaMemConfig, weights: Mapping[str, NDArray]) -> str:
    """SHA-256 over the mechanism and every weight of an adapter, by name."""
    # Options at their default stay out, so that an option to come does not make memories foreign.
    usual, own = DeltaMemConfig().to_dict(), config.to_dict()
    changed = {name: value for name, value in own.items() if value != usual[name]}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(np.ascontiguousarray(weight, dtype=np.float32).tobytes())
    return digest.hexdigest()
