"""A static adapter: the Δ of a memory, with a learned constant in place of the readings, as a baseline for the memory.

It cannot know a conversation. From the same episodes it learns what any reading could teach: the form of the answers,
and which values are frequent. `training.baseline_steps.StaticStepModel` trains one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltamem_tool._version import __version__
from deltamem_tool.adapter.config_file import (
    CONFIG_FILE,
    FORMAT_VERSION,
    STATIC_FORMAT,
    WEIGHTS_FILE,
    BaseModel,
    read_config,
)
from deltamem_tool.adapter.find_base import base_of_model
from deltamem_tool.base_model.attention import AttentionLayer, attention_layers, layers_at, select_layers
from deltamem_tool.base_model.layouts import Projection
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import AdapterError
from deltamem_tool.io.atomic import atomic_folder
from deltamem_tool.io.names import resolve_folder
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.attachment import hf_model
from deltamem_tool.memory.corrections import BASE_SLICE_WIDTH, Corrections
from deltamem_tool.memory.weights import fingerprint_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AGAIN = "Train it again with `deltamem train RECIPE --set static=true`."


class StaticLayer(Corrections):
    """One layer's constant `[H·R]`, which replaces every reading, and its corrections.

    Args:
        config: the mechanism of the memory that it is compared with.
        out_features: output width of each corrected projection, by branch.
    """

    def __init__(self, config: DeltaMemConfig, out_features: Mapping[str, int]) -> None:
        super().__init__(config)
        self.constant = nn.Parameter(torch.empty(config.state_heads * config.rank, dtype=torch.float32))
        self.add_corrections(out_features)
        nn.init.normal_(self.constant, std=config.rank**-0.5)  # a length of about 1 in every head
        self.reset_corrections()

    def offset(self, branch: str) -> Tensor:
        """Return the correction of every output of a branch's projection, float32 `[out]`."""
        return self.correction(branch, self.scale_readings(self.constant.float()))


class StaticAdapter(nn.Module):
    """The static layers of a model: everything that is trained and saved.

    Args:
        config: the mechanism of the memory that it is compared with.
        layers: attention layers that get a constant.
    """

    def __init__(self, config: DeltaMemConfig, layers: Sequence[AttentionLayer]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict()
        for layer in layers:
            widths = {branch: layer.projection(branch).out_features for branch in config.branches}
            self.layers[str(layer.index)] = StaticLayer(config, widths)

    def layer(self, index: int) -> StaticLayer:
        """Return the module of decoder layer `index`."""
        return cast(StaticLayer, self.layers[str(index)])

    def attach_to(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Correct the projections of `model` until the returned handles are removed."""
        layers = layers_at(attention_layers(hf_model(model)), [int(index) for index in self.layers])
        handles = []
        for layer in layers:
            for branch in self.config.branches:
                projection = layer.projection(branch)
                correct = partial(_add, self.layer(layer.index), branch, projection)
                handles.append(projection.linear.register_forward_hook(correct))
        return handles

    def save(self, out: str | Path, base: BaseModel, overwrite: bool, files: Mapping[str, bytes]) -> None:
        """Write the folder, whole or not at all, with the further `files`."""
        config = {
            "format": STATIC_FORMAT,
            "format_version": FORMAT_VERSION,
            "mechanism": self.config.to_dict(),
            "base": asdict(base),
            "deltamem_version": __version__,
        }
        weights = {name: weight.detach().float().cpu().contiguous() for name, weight in self.state_dict().items()}
        contents = {CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(), WEIGHTS_FILE: save(weights)}
        with atomic_folder(out, overwrite) as staged:
            for name, content in {**contents, **files}.items():
                (staged / name).write_bytes(content)


def new_static(
    config: DeltaMemConfig, layers: Sequence[AttentionLayer], first_columns: Callable[[Projection, int], Tensor]
) -> StaticAdapter:
    """Make a new static adapter. The arguments are those of `memory.attach.fresh_adapter`."""
    adapter = StaticAdapter(config, layers)
    if config.delta_init == "base_slice":
        for layer in layers:
            columns = {branch: first_columns(layer.projection(branch), BASE_SLICE_WIDTH) for branch in config.branches}
            adapter.layer(layer.index).start_from_base(columns)
    return adapter


def _add(
    static: StaticLayer, branch: str, projection: Projection, module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> Tensor:
    """Correct the output of a projection, as a forward hook."""
    return output + projection.match_width(output, static.offset(branch)).to(output.dtype)


@dataclass(frozen=True)
class Static:
    """A saved static adapter: a folder of `deltamem train` with `static: true`.

    Attributes:
        folder: folder with its files.
        config: the mechanism of the memory that it is compared with.
        base: the model that it was trained on.
    """

    folder: Path
    config: DeltaMemConfig
    base: BaseModel

    @classmethod
    def read(cls, name: str | Path) -> Static:
        """Read the config of a folder or Hub id; the weights are read by `adapter_for`.

        Raises:
            AdapterError: a file is missing or damaged, or the folder is not that of a static adapter.
            HubError: there is no such folder, or the Hub does not have it.
        """
        folder = resolve_folder(str(name), None, [CONFIG_FILE, WEIGHTS_FILE], "static adapter")
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / file).is_file():
                raise AdapterError(f"{name} is not the folder of a static adapter.", f"It has no {file}.", _AGAIN)
        stored = read_config(folder, name, STATIC_FORMAT)
        return cls(folder, stored.mechanism, stored.base)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of its config and its weights."""
        return fingerprint_of(self.config, {name: weight.float().numpy() for name, weight in self._weights.items()})

    @property
    def description(self) -> str:
        """Its description as a condition of an evaluation."""
        count = sum(weight.numel() for weight in self._weights.values())
        return f"the base model with the static adapter {self.folder.name}, {count:,} trained parameters"

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / WEIGHTS_FILE)
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{self.folder / WEIGHTS_FILE} is damaged.", f"{error}.", _AGAIN) from error

    def check_base(self, base: BaseModel) -> None:
        """Compare the base model by the fingerprint of its weights.

        Raises:
            AdapterError: it was trained on a model other than `base`.
        """
        if (self.base.model_type, self.base.fingerprint) != (base.model_type, base.fingerprint):
            raise AdapterError(
                f"{self.folder} was trained on another base model.",
                f"It was trained on {self.base.name} ({self.base.model_type}, weights {self.base.fingerprint[:12]}…); "
                f"this one is {base.name} ({base.model_type}, weights {base.fingerprint[:12]}…).",
                "Use a static adapter of the same base model.",
            )

    def check(self, model: PreTrainedModel) -> None:
        """Compare its base model and corrections with those of a model with a memory.

        Raises:
            AdapterError: it was trained on another model, or the corrections have other layers or branches, or a Δ of
                another shape.
        """
        self.check_base(base_of_model(hf_model(model)))
        memory = adapter_of(model)
        ours = {name: tuple(weight.shape) for name, weight in self._weights.items() if ".delta." in name}
        theirs = {name: tuple(weight.shape) for name, weight in memory.state_dict().items() if ".delta." in name}
        if ours != theirs:
            names = sorted(ours.keys() | theirs.keys())
            differing = [name for name in names if ours.get(name) != theirs.get(name)]
            raise AdapterError(
                f"{self.folder} does not match the memory.",
                f"These tensors are missing, extra or have another shape: {', '.join(differing[:8])}.",
                "Train one with the recipe of this memory and --set static=true.",
            )

    def adapter_for(self, model: PreTrainedModel) -> StaticAdapter:
        """Return its module for `model`, with its weights.

        Raises:
            AdapterError: the weights are damaged, contain NaN or infinity, or do not fit the model.
        """
        layers = select_layers(attention_layers(hf_model(model)), self.config)
        with torch.device("meta"):
            adapter = StaticAdapter(self.config, layers)
        expected = {name: weight.shape for name, weight in adapter.state_dict().items()}
        names = sorted(expected.keys() | self._weights.keys())
        differing = [
            name
            for name in names
            if name not in self._weights
            or self._weights[name].shape != expected.get(name)
            or not self._weights[name].isfinite().all()
        ]
        if differing:
            raise AdapterError(
                f"{self.folder} does not fit the model.",
                f"These tensors are missing, extra, not finite or have another shape: {', '.join(differing[:8])}.",
                _AGAIN,
            )
        adapter.load_state_dict({name: weight.float() for name, weight in self._weights.items()}, assign=True)
        return adapter

    @contextmanager
    def applied_to(self, model: PreTrainedModel) -> Iterator[None]:
        """Put the static adapter on `model` inside the block.

        Raises:
            AdapterError: the weights are damaged, or do not fit the model.
        """
        handles = self.adapter_for(model).to(model.device).requires_grad_(False).attach_to(model)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
