"""Estimate the peak memory of a training step by running one on fake tensors.

Fake tensors have shapes but no values, and autograd keeps what it would keep in a real step. Two models with few layers
are enough. The difference between them is what the additional layers need in each phase of the step, and it is
extrapolated to the model's own number of layers.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from deltamem_tool._compat import FakeTensorMode, TorchDispatchMode, tree_leaves, without_packing_search
from deltamem_tool.base_model.attention import attention_layers, select_layers
from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.base_model.layouts import Projection
from deltamem_tool.baselines.lora import new_lora
from deltamem_tool.baselines.static import new_static
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.memory.attach import fresh_adapter, hook
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.ops.scan import use_implementation
from deltamem_tool.recipe.load import Recipe
from deltamem_tool.segments.tags import SegmentTag
from deltamem_tool.training.addressing import Addresses
from deltamem_tool.training.baseline_steps import LoraStepModel, StaticStepModel, Step
from deltamem_tool.training.loss import EpisodeModel

Report = Callable[[int, int], None]  # fake steps done, of how many

_ENDS = 2  # the first and the last layer, which keep less than those between them


@dataclass(frozen=True)
class StepShape:
    """The largest input of one call of the model: conversations, exchanges, and tokens without padding."""

    conversations: int
    write: int  # tokens of a history
    exchanges: int  # of all conversations together
    read: int  # tokens of an exchange
    full: int  # tokens of an exchange after its whole history
    scored: int  # tokens, of all exchanges together
    unrelated: int = 0  # tokens of an exchange that no memory is needed for, all of them scored

    def batch(self, segments: bool, full: bool) -> dict[str, Tensor]:
        """Tensors as `data.collate` makes them, of one token, and without masks: nothing is padding."""

        def ids(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long)

        read = ids(self.exchanges, self.read)
        batch: dict[str, Any] = {"write_ids": ids(self.conversations, self.write), "read_ids": read, "labels": read}
        batch |= {"write_mask": None, "read_mask": None, "full_mask": None}
        batch |= {name: ids(self.scored) for name in ("scored", "targets")} | {"rows": ids(self.exchanges)}
        if segments:
            batch["write_segment_tags"] = torch.full(
                (self.conversations, self.write), SegmentTag.LAST, dtype=torch.int8
            )
        if full:
            batch |= {"full_ids": ids(self.exchanges, self.full), "full_scored": ids(self.scored)}
        if self.unrelated:
            others = ids(self.conversations, self.unrelated)
            batch |= {"unrelated_ids": others, "unrelated_mask": None, "unrelated_scored": others.flatten()}
        return batch


class LiveBytes(TorchDispatchMode):  # type: ignore[misc]  # _compat gives its names as Any
    """Counts the bytes of all tensors that operations give, or that `track` is told of, while anything refers to them.

    `peaks` has the most there were, by phase; `enter` begins one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peaks: dict[str, int] = {}
        self._phase: str | None = None
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        self._phase = phase
        self._note()

    def track(self, *tensors: Any) -> None:
        """Count tensors that no operation gave."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()  # views have one in common
            key, count = id(storage), storage.nbytes()
            if key in self._alive:
                continue

            def on_release(_: Any, key: int = key, count: int = count) -> None:
                self.now -= count
                del self._alive[key]

            self._alive[key] = weakref.ref(storage, on_release)
            self.now += count
        self._note()

    def _note(self) -> None:
        if self._phase is not None:
            self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.track(*tree_leaves(output))
        return output


def step_peaks(step: Step, base: nn.Module, shape: StepShape) -> dict[str, int]:
    """Run `step` forward and backward; of each phase the most bytes that were alive beyond weights and gradients.

    A phase is a pass of the model, or its part of the backward pass: in each of them what is alive grows linearly with
    the number of layers, and so does its peak, while their maximum may not.
    """
    live = LiveBytes()
    live.track(*base.parameters(), *base.buffers(), *step.parameters())
    for weight in step.parameters():
        weight.grad = torch.zeros_like(weight)  # as after the first of the batches that make a step
        live.track(weight.grad)
    before = live.now
    if isinstance(step, EpisodeModel):
        segments = step.adapter.config.granularity != "token"
        batch = shape.batch(segments, full=step.objective.full_context_kl > 0)
    else:
        full = isinstance(step, LoraStepModel) or step.objective.full_context_kl > 0
        batch = shape.batch(segments=False, full=full)
    step.train()
    with live, _phases(step, live) if isinstance(step, EpisodeModel) else nullcontext():
        live.enter("forward")
        loss = step(**batch)["loss"]
        live.enter("backward")
        loss.backward()
    for weight in step.parameters():
        weight.grad = None
    return {phase: peak - before for phase, peak in live.peaks.items()}


@contextmanager
def _phases(step: EpisodeModel, live: LiveBytes) -> Iterator[None]:
    """Tell `live` when a pass begins, and when the backward pass comes to the write pass.

    Which tokens have an address depends on values; it is as many as can be.
    """
    methods = {name: getattr(step, name) for name in ("write", "answer", "base_logits")}

    def announce(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            live.enter(name)
            return methods[name](*args, **kwargs)

        return run

    def answer(memory: MemoryState, *args: Any) -> Any:
        for state in memory.layers.values():  # their gradients are the last thing that the read pass gives
            if state.requires_grad:
                state.register_hook(lambda _: live.enter("write, backward"))  # type: ignore[no-untyped-call]
        return announce("answer")(memory, *args)

    own: dict[str, Any] = {name: announce(name) for name in methods} | {
        "answer": answer,
        "addresses": Addresses.upper_bound,
    }
    for name, method in own.items():
        setattr(step, name, method)
    try:
        yield
    finally:
        for name in own:
            delattr(step, name)  # the class's own shows again


def activation_bytes(
    recipe: Recipe,
    checkpoint: BaseCheckpoint,
    memory: DeltaMemConfig,
    shape: StepShape,
    report: Report | None = None,
) -> int:
    """The most bytes that a step of `recipe` keeps alive beyond weights and gradients, computed on fake tensors.

    Every layer counts as one that has a memory. The scan is the one that a GPU runs.
    """
    layers: int = checkpoint.config.get_text_config(decoder=True).num_hidden_layers
    period = layer_period(checkpoint.config)
    fewest = _ENDS + period  # the peak may be in any kind of layer
    counts = [fewest, fewest + period] if fewest + period < layers else [layers]
    peaks = []
    for done, count in enumerate(counts):
        if report is not None:
            report(done, len(counts))
        peaks.append(_fake_peaks(recipe, checkpoint, memory, shape, count))
    if report is not None:
        report(len(counts), len(counts))
    few, more = peaks[0], peaks[-1]
    periods = (layers - counts[0]) / period
    return round(max(few[phase] + (more[phase] - few[phase]) * periods for phase in more))


def _fake_peaks(
    recipe: Recipe, checkpoint: BaseCheckpoint, memory: DeltaMemConfig, shape: StepShape, layers: int
) -> dict[str, int]:
    """Return `step_peaks` for the base model with this number of layers."""
    training = recipe.training
    config = with_layers(checkpoint.config, layers)
    options: dict[str, Any] = {"dtype": base_dtype(recipe, checkpoint.config)}
    if training.attention == "eager":
        options["attn_implementation"] = "eager"
    with torch.device("meta"):
        base = checkpoint.from_config(config, **options)
    base.train(False)
    lora = None if recipe.lora is None else new_lora(base, recipe.lora)
    with FakeTensorMode(allow_non_fake_inputs=True), use_implementation("chunked"), without_packing_search():
        if lora is not None:
            lora.to_empty(device="cpu")
            return step_peaks(LoraStepModel(lora, training.gradient_checkpointing), base, shape)
        base.to_empty(device="cpu")
        everywhere = dataclasses.replace(memory, layers="all")
        attention = select_layers(attention_layers(base), everywhere)
        if recipe.static:
            static = new_static(everywhere, attention, no_columns)
            step = StaticStepModel(base, static, None, recipe.objective, training.gradient_checkpointing)
            return step_peaks(step, base, shape)
        hook(base, fresh_adapter(everywhere, attention, no_columns))
        chunks = (training.write_chunk, training.bptt, training.gradient_checkpointing)
        return step_peaks(EpisodeModel(base, recipe.objective, *chunks), base, shape)


def no_columns(projection: Projection, count: int) -> Tensor:
    """Replace the base model's weights, which do not exist here."""
    return torch.zeros(projection.out_features, count, dtype=torch.float32)


def base_dtype(recipe: Recipe, config: PretrainedConfig) -> torch.dtype:
    """Return the data type of the base model's weights: from the recipe, the config, or transformers' default."""
    dtype: torch.dtype | str = recipe.training.dtype
    if dtype == "auto":
        dtype = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
    named = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert isinstance(named, torch.dtype)
    return named


def layer_period(config: PretrainedConfig) -> int:
    """Return the number of layers after which their kinds repeat: 1 if all are equal, all if nothing repeats."""
    text = config.get_text_config(decoder=True)
    lists = _by_layer(text).values()
    every: int = text.num_hidden_layers
    alike = (p for p in range(1, every) if all(kinds[i] == kinds[i - p] for kinds in lists for i in range(p, every)))
    return next(alike, every)


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy with only the first so many layers."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config(decoder=True)
    for name, kinds in _by_layer(text).items():
        setattr(text, name, kinds[:layers])
    text.num_hidden_layers = layers
    return cut


def _by_layer(text: PretrainedConfig) -> dict[str, list[Any]]:
    """Return the options of a config that have one value per layer."""
    every = text.num_hidden_layers
    return {
        name: value
        for name, value in vars(text).items()
        if "layer" in name and isinstance(value, list) and len(value) == every
    }
