"""Losses and gradients of a training step, to compare with others."""

from __future__ import annotations

import torch
from helpers.tiny import base_parameters

from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.training.loss import EpisodeModel

LOSS_TOLERANCE = 2e-5  # float32 against the float64 equations; the loss is about 5
SAME_TOLERANCE = 2e-5  # float32, the same sums in another order; gradients are of order 1


def gradients(model, batch, **options):
    """The loss, and every gradient of the adapter."""
    adapter = adapter_of(model)
    adapter.zero_grad()
    loss = EpisodeModel(model, **options)(**batch)["loss"]
    loss.backward()
    assert all(parameter.grad is None for parameter in base_parameters(model))
    return loss.item(), {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}


def same(actual, expected, tolerance=SAME_TOLERANCE):
    assert abs(actual[0] - expected[0]) < tolerance
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            actual[1][name], gradient, atol=tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
