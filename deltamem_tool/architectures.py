"""Where each model keeps its attention's projections. A row for a layout; a layout is found in the module tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import ArchitectureError


@dataclass(frozen=True)
class Layout:
    """Names of an attention module's own linear layers."""

    q: str
    k: str
    v: str
    o: str


LAYOUTS = (
    Layout(q="q_proj", k="k_proj", v="v_proj", o="o_proj"),  # Qwen, Llama, SmolLM3, Mistral, …
)


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention module of a decoder."""

    index: int  # of the decoder layer
    name: str  # of the module in the model
    module: nn.Module
    layout: Layout

    def projection(self, branch: str) -> nn.Linear:
        return getattr(self.module, getattr(self.layout, branch))

    def weight_name(self, branch: str) -> str:
        return f"{self.name}.{getattr(self.layout, branch)}.weight"

    @property
    def hidden_size(self) -> int:
        return self.projection("q").in_features


def attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """The decoder's causal self-attention modules, in order of depth.

    Raises:
        ArchitectureError: `model` is not a decoder, or no module has a known layout, or one has it by name alone.
    """
    config = model.config
    if not model.can_generate() or getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{type(model).__name__} ({config.model_type}) takes no memory.",
            "It is not a decoder-only causal language model.",
            "Use a causal language model, such as Qwen3, Llama or SmolLM3.",
        )
    found = []
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        layout = next((layout for layout in LAYOUTS if _has(module, layout)), None)
        if layout is not None and isinstance(index, int) and getattr(module, "is_causal", True):
            found.append(AttentionLayer(index, name, module, layout))
    if not found:
        raise ArchitectureError(
            f"The attention of {type(model).__name__} ({config.model_type}) is not known.",
            "No module has the projections " + " or ".join(_names(layout) for layout in LAYOUTS) + ".",
            "Use a model with Llama-style attention, such as Qwen3, Llama or SmolLM3.",
        )
    found.sort(key=lambda layer: layer.index)
    strange = _strange(found, config.get_text_config())
    if strange:
        raise ArchitectureError(
            f"The attention of {type(model).__name__} ({config.model_type}) is not laid out as its names say.",
            strange,
            "Use a model with Llama-style attention, such as Qwen3, Llama or SmolLM3.",
        )
    return found


def _strange(layers: Sequence[AttentionLayer], config: PretrainedConfig) -> str:
    """Why a correction would not land where it belongs: a projection that holds more than its heads, such as a gate
    beside the query, or two modules that claim one layer."""
    query_heads = getattr(config, "num_attention_heads", None)
    heads = {"q": query_heads, "k": getattr(config, "num_key_value_heads", None) or query_heads}
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        if after is not None and layer.index == after.index:
            return f"{layer.name} and {after.name} are both of layer {layer.index}."
        head_dim = getattr(layer.module, "head_dim", None) or getattr(config, "head_dim", None)
        for branch, count in heads.items():
            width = layer.projection(branch).out_features
            if isinstance(count, int) and width != count * (head_dim or layer.hidden_size // count):
                return f"{layer.name}.{getattr(layer.layout, branch)} is {width} wide, for {count} heads of {head_dim}."
    return ""


def select_layers(found: Sequence[AttentionLayer], config: DeltaMemConfig) -> list[AttentionLayer]:
    """The layers that `config.layers` names; its parts count attention layers.

    Raises:
        ArchitectureError: an index names no attention layer, or there are fewer layers than a part asks for.
    """
    if config.layers == "all":
        return list(found)
    if config.layer_part is None:
        return layers_at(found, [int(index) for index in config.layers])
    part, count = config.layer_part
    if count > len(found):
        raise ArchitectureError(
            f"The model has no {count} attention layers.",
            f"It has {len(found)}, and `layers` is {config.layers!r}.",
            "Correct the option `layers`.",
        )
    start = {"front": 0, "middle": (len(found) - count) // 2, "back": len(found) - count}[part]
    return list(found[start : start + count])


def layers_at(found: Sequence[AttentionLayer], indices: Sequence[int]) -> list[AttentionLayer]:
    """The layers of these indices, in order of depth.

    Raises:
        ArchitectureError: an index names no attention layer.
    """
    by_index = {layer.index: layer for layer in found}
    missing = [index for index in indices if index not in by_index]
    if missing:
        raise ArchitectureError(
            f"The model has no attention in layers {missing}.",
            f"Its attention layers are {sorted(by_index)}.",
            "Correct the option `layers`.",
        )
    return [by_index[index] for index in sorted(indices)]


def _has(module: nn.Module, layout: Layout) -> bool:
    return all(hasattr(getattr(module, name, None), "in_features") for name in (layout.q, layout.k, layout.v, layout.o))


def _names(layout: Layout) -> str:
    return ", ".join((layout.q, layout.k, layout.v, layout.o))
