"""Find a model's attention layers and their projections (`layouts` has the rows)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from deltamem_tool._compat import without_compilation
from deltamem_tool.base_model.layouts import LAYOUTS, UNSUPPORTED, Layout, Projection, features, find
from deltamem_tool.base_model.sharding import is_split
from deltamem_tool.config import BRANCHES, DeltaMemConfig
from deltamem_tool.errors import ArchitectureError, ConfigError

# Names of modules that attend to something other than the preceding text, or do not use softmax.
_OTHER = re.compile(r"cross|encoder_attn|vision|image|img_|audio|linear_attn")
_OTHER_CLASS = re.compile(r"Delta(Net|Attention)")


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention module of a decoder."""

    index: int  # of the decoder layer
    name: str  # of the module in the model
    module: nn.Module
    projections: Mapping[str, Projection]  # by branch: the projections that can be corrected
    note: str  # why the other branches cannot be corrected
    hidden_size: int  # width of the input of the attention and the memory

    def projection(self, branch: str) -> Projection:
        """Return the projection of `branch`.

        Raises:
            ConfigError: this layer has no such branch.
        """
        if branch not in self.projections:
            raise ConfigError(
                f"A memory cannot correct {branch} in layer {self.index}.",
                _sentence(self.note),
                f"Use the branches {', '.join(self.projections)}, or other layers.",
            )
        return self.projections[branch]


def check_heads(model: PreTrainedModel) -> None:
    """Check that tensor parallelism gives every process whole heads of `model`.

    Raises:
        ArchitectureError: some heads would be split.
    """
    text: Any = model.config.get_text_config(decoder=True)
    heads: int = text.num_attention_heads
    key_heads: int = getattr(text, "num_key_value_heads", None) or heads
    projections = attention_layers(model)[0].projections
    for branch, kind, count in (("q", "query", heads), ("k", "key", key_heads)):
        projection = projections.get(branch)
        weight = None if projection is None or not projection.is_whole else projection.linear.weight
        if is_split(weight) and count % weight.device_mesh.size():
            raise ArchitectureError(
                f"{weight.device_mesh.size()} processes cannot share the {kind} heads of this model.",
                f"It has {count} per layer, and every process needs the same number.",
                f"Start a number of processes that divides {math.gcd(heads, key_heads)}.",
            )


def attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """Return the decoder's causal self-attention modules, in order of depth.

    Raises:
        ArchitectureError: `model` is not a decoder, or no module has a known layout, or one has it only by its names.
    """
    config = model.config
    text = config.get_text_config(decoder=True)
    called = f"{type(model).__name__} ({config.model_type})"
    types = frozenset({config.model_type, text.model_type})
    refused = sorted(types & UNSUPPORTED.keys())
    if refused:
        raise ArchitectureError(f"{called} cannot have a memory.", _sentence(UNSUPPORTED[refused[0]]), _ADVICE)
    if not model.can_generate() or getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{called} cannot have a memory.", "It is not a decoder-only causal language model.", _ADVICE
        )
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]  # transformers has no types
    if not isinstance(decoder, PreTrainedModel):  # some models call their output layer a decoder
        decoder = model.base_model
    prefix = next((f"{name}." if name else "" for name, module in model.named_modules() if module is decoder), "")
    layouts = [layout for layout in LAYOUTS if layout.is_of(types)]
    found: dict[
        nn.Module, AttentionLayer
    ] = {}  # by its query's projection, which a wrapper of the attention shows, too
    for name, module in decoder.named_modules():
        layout = next((layout for layout in layouts if layout.fits(module)), None)
        index = _index(name, module)
        other = _OTHER.search(name) or _OTHER_CLASS.search(type(module).__name__)
        if layout is not None and index is not None and not other:
            _check_decoder(layout, text, called)
            layer = _layer(index, prefix + name, module, layout, text)
            found[layer.projections["q"].linear] = layer
    layers = list(found.values())
    if not layers:
        raise ArchitectureError(
            f"The attention of {called} is not known.", "No module has projections of a known layout.", _ADVICE
        )
    layers.sort(key=lambda layer: layer.index)
    strange = _misfit_reason(layers)
    if strange:
        raise ArchitectureError(
            f"The attention of {called} does not have the layout that its names suggest.", strange, _ADVICE
        )
    return layers


_ADVICE = "`deltamem architectures` lists the models that can, such as Qwen3, Llama or SmolLM3."


def _sentence(reason: str) -> str:
    return f"{reason[0].upper()}{reason[1:]}."


def _layer(index: int, name: str, module: nn.Module, layout: Layout, config: PretrainedConfig) -> AttentionLayer:
    projections = {}
    for branch, span in layout.spans(config).items():
        linear = without_compilation(find(module, span.linear))
        assert isinstance(linear, nn.Module)  # the layout fits
        projections[branch] = Projection(f"{name}.{span.linear}", linear, span)
    ordered = {branch: projections[branch] for branch in BRANCHES if branch in projections}
    entry = find(module, layout.entry) if layout.entry else projections["q"].linear
    assert isinstance(entry, nn.Module)
    return AttentionLayer(index, name, module, ordered, layout.note, features(entry)[0])


def _index(name: str, module: nn.Module) -> int | None:
    """Return the layer index that a module records, or else the first number in its name."""
    for at in ("layer_idx", "self.layer_idx"):
        index = find(module, at)
        if isinstance(index, int) and index >= 0:
            return index
    number = re.search(r"(?:^|\.)(\d+)\.", f"{name}.")
    return int(number[1]) if number else None


def _check_decoder(layout: Layout, config: PretrainedConfig, called: str) -> None:
    if layout.only_decoders and not getattr(config, "is_decoder", False):
        raise ArchitectureError(
            f"{called} cannot have a memory.",
            "It is an encoder: its tokens attend in both directions.",
            "If it was trained as a decoder, its config says is_decoder=True.",
        )


def _misfit_reason(layers: Sequence[AttentionLayer]) -> str:
    """Return why a correction would not reach its branch, or "" if it would.

    A linear layer may hold more than its heads, such as a gate beside the query, or two modules may claim one layer.
    """
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        if after is not None and layer.index == after.index:
            return f"{layer.name} and {after.name} are both of layer {layer.index}."
        if "v" not in layer.projections:
            continue  # packed keys and values: their heads have sizes of other names
        query, output = layer.projections["q"], layer.projections["o"]
        # The output of attention has as many heads as there are queries, each as wide as a value.
        width = getattr(layer.module, "head_dim", None) or 1
        value_width = getattr(layer.module, "v_head_dim", None) or width
        if query.out_features * value_width != output.in_features * width:
            return f"{query.name} is {query.out_features} wide, and {output.name} takes {output.in_features}."
    return ""


def select_layers(layers: Sequence[AttentionLayer], config: DeltaMemConfig) -> list[AttentionLayer]:
    """Return the layers that `config.layers` selects. Named parts, such as the front, count attention layers only.

    Raises:
        ArchitectureError: an index names no attention layer, or the model has fewer layers than the part needs.
    """
    if config.layers == "all":
        return list(layers)
    if config.layer_part is None:
        return layers_at(layers, [int(index) for index in config.layers])
    part, count = config.layer_part
    if count > len(layers):
        raise ArchitectureError(
            f"The model has no {count} attention layers.",
            f"It has {len(layers)}, and `layers` is {config.layers!r}.",
            "Correct the option `layers`.",
        )
    start = {"front": 0, "middle": (len(layers) - count) // 2, "back": len(layers) - count}[part]
    return list(layers[start : start + count])


def layers_at(layers: Sequence[AttentionLayer], indices: Sequence[int]) -> list[AttentionLayer]:
    """Return the layers with these indices, in order of depth.

    Raises:
        ArchitectureError: an index names no attention layer.
    """
    by_index = {layer.index: layer for layer in layers}
    missing = [index for index in indices if index not in by_index]
    if missing:
        raise ArchitectureError(
            f"The model has no attention in layers {missing}.",
            f"Its attention layers are {sorted(by_index)}.",
            "Correct the option `layers`.",
        )
    return [by_index[index] for index in sorted(indices)]
