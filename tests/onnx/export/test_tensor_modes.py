"""Replacements of operations during tracing give the same numbers."""

from __future__ import annotations

import pytest
import torch
from base_model.test_export_sweep import patched
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deltamem_tool.onnx.export.tensor_modes import ExportableCalls, run_every_expert

TOLERANCE = 1e-5  # float32, sums in another order


@pytest.mark.parametrize("part", [(slice(None), None), (Ellipsis, slice(1, 3)), 1])
def test_indexing_complex_numbers_matches_torch(part: object):
    numbers = torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    with ExportableCalls():
        actual = numbers[part]
    assert torch.equal(actual, numbers[part])


@pytest.mark.parametrize(("shape", "axis"), [((2, 3), 0), ((2, 3), -1), ((1, 3), 0)])
def test_an_axis_is_squeezed_only_if_it_is_of_size_1(shape: tuple[int, ...], axis: int):
    x = torch.zeros(shape)
    with ExportableCalls():
        assert x.squeeze(axis).shape == torch.zeros(shape).squeeze(axis).shape


class Sums(TorchFunctionMode):
    """Counts the additions to rows of a tensor."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is Tensor.index_add_
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("model_type", "computed"), [("dbrx", 4), ("longcat_flash", 2), ("qwen3_moe", 0)])
def test_a_loop_over_chosen_experts_covers_all_experts(model_type: str, computed: int):
    """Covers all four of DBRX, LongCat, which checks which experts have tokens, and Qwen3, which has no loop."""
    model = patched(model_type)
    experts = next(part for name, part in model.named_modules() if name.endswith("experts"))
    random = torch.Generator().manual_seed(0)
    width = model.get_input_embeddings().weight.shape[-1]
    x, weights = torch.randn(5, width, generator=random), torch.rand(5, 2, generator=random)
    index = torch.tensor([[0, 2], [2, 0], [2, 0], [0, 2], [0, 2]])  # and no token selects the others
    with torch.no_grad():
        expected = experts(x, index, weights)
        with Sums() as sums, run_every_expert(model):
            actual = experts(x, index, weights)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    assert sums.count == computed and "forward" not in vars(experts)
