"""The table of weight shapes matches the modules."""

from __future__ import annotations

import pytest
import torch

from deltamem_tool.config import DELTA_SCALES, GATES, DeltaMemConfig
from deltamem_tool.memory.layer import DeltaMemLayer
from deltamem_tool.memory.weights import weight_shapes


@pytest.mark.parametrize("o_norm", [False, True])
@pytest.mark.parametrize("delta_scale", DELTA_SCALES)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("couple_lambda", [False, True])
@pytest.mark.parametrize("heads", [("q", "o"), ("q", "k", "v", "o"), ("o",)])
def test_the_table_of_shapes_matches_the_modules(heads, couple_lambda, gates, delta_scale, o_norm):
    options = {"couple_lambda": couple_lambda, "gates": gates, "delta_scale": delta_scale, "o_norm": o_norm}
    config = DeltaMemConfig(rank=4, state_heads=3, branches=heads, **options)
    widths = {branch: 100 + number for number, branch in enumerate(heads)}
    with torch.device("meta"):
        layer = DeltaMemLayer(config, 40, widths)
    shapes = {name: tuple(weight.shape) for name, weight in layer.state_dict().items()}
    assert weight_shapes(config, 40, widths) == shapes
    unknown = {40, *widths.values()}
    for name, shape in weight_shapes(config).items():
        assert shape == tuple(None if size in unknown else size for size in shapes[name])
