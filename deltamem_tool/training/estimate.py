"""Estimate the duration of a run from one step, whose result is discarded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltamem_tool.data.collate import EpisodeCollator

LONG = 30.0  # seconds: a step that takes less is measured again, without what is done once


def step_seconds(
    step: nn.Module,
    episodes: Sequence[Any],
    collator: EpisodeCollator,
    batch_size: int,
    device: torch.device,
    together: bool = False,
) -> float:
    """Measure the seconds of a forward and a backward pass for a batch from the middle of `episodes`.

    Weights and the random states of CPU and CUDA are left unchanged; gradients are cleared.

    Args:
        step: the step as the Trainer trains it, on `device`.
        episodes: episodes of the run.
        collator: makes a batch of episodes.
        batch_size: number of episodes in a batch.
        device: device that the step runs on.
        together: all processes measure. They need each other for a step, so all of them run it twice.
    """
    start = max(0, len(episodes) // 2 - batch_size // 2)
    batch = collator([episodes[i] for i in range(start, min(start + batch_size, len(episodes)))])
    tensors = {name: part.to(device) for name, part in batch.items() if isinstance(part, Tensor)}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seconds = _measure(step, tensors, device)
        if together or seconds < LONG:
            seconds = _measure(step, tensors, device)
    return seconds


def _measure(step: nn.Module, batch: dict[str, Tensor], device: torch.device) -> float:
    training = step.training
    step.train()
    began = time.monotonic()
    step(**batch)["loss"].backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.monotonic() - began
    step.train(training)
    for weight in step.parameters():
        weight.grad = None
    return seconds
