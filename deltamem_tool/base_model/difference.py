"""Measure how much the weights of two checkpoints of one model differ, such as a quantised one and its original."""

from __future__ import annotations

import math

import torch

from deltamem_tool.base_model.checkpoint import BaseCheckpoint

COLUMNS = 64  # of each projection: enough for three digits, and little to read


def relative_difference(checkpoint: BaseCheckpoint, original: BaseCheckpoint) -> float | None:
    """Return the RMS difference of two checkpoints' attention projections, relative to the RMS of the original's.

    Returns:
        The quotient, or None if their layers or shapes differ.

    Raises:
        ArchitectureError: a checkpoint cannot be read.
        ConfigError: its weights are packed integers.
    """
    squares = torch.zeros(2, dtype=torch.float64)  # of the differences, and of the original's weights
    if len(checkpoint.layers) != len(original.layers):
        return None
    for layer, other in zip(checkpoint.layers, original.layers, strict=True):
        if layer.projections.keys() != other.projections.keys():
            return None
        for branch in layer.projections:
            weight = checkpoint.first_columns(layer.projection(branch), COLUMNS).double()
            reference = original.first_columns(other.projection(branch), COLUMNS).double()
            if weight.shape != reference.shape:
                return None
            squares += torch.stack([(weight - reference).square().sum(), reference.square().sum()])
    return math.sqrt(squares[0] / squares[1])
