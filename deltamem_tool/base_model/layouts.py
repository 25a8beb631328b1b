"""Where attention modules keep their query, key, value and output projections: one row for each layout.

A projection that is a separate linear layer is found by its name, in any model. For a fused projection, the name does
not say how its output is interleaved, so its row applies only to the model types that it lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from deltamem_tool.base_model.placement import load_offloaded
from deltamem_tool.base_model.sharding import full_tensor, is_split, local_part
from deltamem_tool.errors import ArchitectureError


@dataclass(frozen=True)
class Span:
    """A branch's share of a projection's output `[..., G·W]`: in each of G groups, the columns from start to stop."""

    linear: str  # dotted name inside the attention module
    groups: int = 1
    start: int = 0
    stop: int | None = None  # None: all of the output


Spans = Mapping[str, Span]  # by branch; missing branches do not exist in this layout


@dataclass(frozen=True)
class Layout:
    """One way in which attention modules store their projections."""

    spans: Callable[[PretrainedConfig], Spans]
    linears: tuple[str, ...]  # linear layers that the attention module must have
    lacks: tuple[str, ...] = ()  # and those that it must not have
    types: frozenset[str] = frozenset()  # model types; empty for any model with these linear layers
    entry: str = ""  # linear layer whose input is that of the attention; "" for the query's
    only_decoders: bool = False  # attends in both directions unless its config says `is_decoder`
    note: str = ""  # why branches are missing, for error messages

    def is_of(self, model_types: frozenset[str]) -> bool:
        """Return whether models of these types may have this layout."""
        return not self.types or bool(self.types & model_types)

    def fits(self, module: nn.Module) -> bool:
        """Return whether `module` has the linear layers of this layout, and none that the layout excludes."""
        return all(is_linear(find(module, name)) for name in self.linears) and not any(
            find(module, name) is not None for name in self.lacks
        )


def find(module: nn.Module, name: str) -> object:
    """Return the attribute of `module` with the dotted `name`, or None."""
    try:
        return attrgetter(name)(module)
    except AttributeError:
        return None


def is_linear(module: object) -> bool:
    """Return whether `module` is a linear layer: torch's, a quantised one, or GPT-2's transposed Conv1D."""
    return hasattr(module, "in_features") or is_transposed(module)


def is_transposed(module: object) -> bool:
    """Return whether `module` is GPT-2's Conv1D, whose weight is `[in, out]`."""
    return type(module).__name__ == "Conv1D"


def features(linear: nn.Module) -> tuple[int, int]:
    """Return the input and output width of a linear layer."""
    return (linear.nx, linear.nf) if is_transposed(linear) else (linear.in_features, linear.out_features)  # type: ignore[return-value]


@dataclass(frozen=True)
class Projection:
    """One branch of one attention layer: a linear layer, or a part of its output."""

    name: str  # of the linear layer in the model
    linear: nn.Module
    span: Span

    @property
    def in_features(self) -> int:
        """Width of the linear layer's input."""
        return features(self.linear)[0]

    @property
    def width(self) -> int:
        """Width of the linear layer's output, over all processes."""
        return features(self.linear)[1]

    @property
    def out_features(self) -> int:
        """Width of the branch."""
        return self.span.groups * (self._stop - self.span.start)

    @property
    def weight(self) -> Tensor:
        """The linear layer's whole weight with all its branches, also if accelerate has offloaded it.

        If it is split over processes, all of them must read it.
        """
        with load_offloaded(self.linear):
            return full_tensor(cast(Tensor, self.linear.weight))

    @property
    def weight_name(self) -> str:
        """Name of that weight in the model."""
        return f"{self.name}.weight"

    @property
    def is_whole(self) -> bool:
        """Whether the branch is the whole output of the linear layer."""
        return self.out_features == self.width

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored as `[in, out]`."""
        return is_transposed(self.linear)

    @cached_property
    def local_columns(self) -> Tensor:
        """Columns of the linear layer's output that this process computes under tensor parallelism, int64 `[local]`.

        Raises:
            ArchitectureError: the weight does not show which columns these are.
        """
        weight = self.linear.weight
        if not is_split(weight):
            raise ArchitectureError(
                f"deltamem cannot determine which part of {self.name} this process computes.",
                "Its output is narrower than its weight, which is not a DTensor.",
                "Load the model without quantisation, or without tensor parallelism.",
            )
        return local_part(torch.arange(self.width), weight)

    @property
    def _group(self) -> int:
        return self.width // self.span.groups

    @property
    def _stop(self) -> int:
        return self._group if self.span.stop is None else self.span.stop

    def take(self, output: Tensor) -> Tensor:
        """Return the branch `[..., out]` from the output of the linear layer."""
        grouped: Tensor = output.unflatten(-1, (self.span.groups, -1))  # type: ignore[no-untyped-call]  # torch has no types
        return grouped[..., self.span.start : self._stop].flatten(-2)

    def place(self, correction: Tensor) -> Tensor:
        """Pad a branch's `correction` `[..., out]` with zeros to the width of the linear layer's output."""
        grouped: Tensor = correction.unflatten(-1, (self.span.groups, -1))  # type: ignore[no-untyped-call]  # as above
        return F.pad(grouped, (self.span.start, self._group - self._stop)).flatten(-2)

    def match_width(self, output: Tensor, correction: Tensor) -> Tensor:
        """Return the part of the branch's `correction` `[..., out]` to add to the linear layer's `output`.

        This is all of it, or the part of this process if other processes compute the rest.
        """
        placed = correction if self.is_whole else self.place(correction)
        return placed if output.shape[-1] == self.width else placed.index_select(-1, self.local_columns)


def _separate(q: str, k: str, v: str, o: str, **options: Any) -> Layout:
    """Four linear layers."""
    names = {"q": q, "k": k, "v": v, "o": o}
    spans = {branch: Span(linear) for branch, linear in names.items()}
    return Layout(lambda config: spans, tuple(names.values()), **options)


def _query_and_output(q: str, o: str, note: str, entry: str = "", **options: Any) -> Layout:
    """A query and an output projection; keys and values cannot be corrected separately."""
    spans = {"q": Span(q), "o": Span(o)}
    return Layout(lambda config: spans, (q, o, entry or q), note=note, entry=entry, **options)


def _fused(
    linear: str, o: str, spans: Callable[[str, PretrainedConfig], Spans], types: str, entry: str = "", note: str = ""
) -> Layout:
    """Return the layout of one linear layer for several branches."""
    return Layout(
        lambda config: {**spans(linear, config), "o": Span(o)},
        (linear, o, entry or linear),
        types=frozenset(types.split()),
        entry=entry,
        note=note,
    )


def _side_by_side(linear: str, widths: Mapping[str, int], groups: int = 1) -> Spans:
    spans, start = {}, 0
    for branch, width in widths.items():
        spans[branch] = Span(linear, groups, start, start + width)
        start += width
    return spans


def _heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """Return the numbers of query heads and key heads, and the width of a head."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _thirds(linear: str, config: PretrainedConfig) -> Spans:
    """[q of all heads | k | v]."""
    return _side_by_side(linear, dict.fromkeys("qkv", config.hidden_size))


def _thirds_per_head(linear: str, config: PretrainedConfig) -> Spans:
    """For each head, [q | k | v]."""
    heads, _, width = _heads(config)
    return _side_by_side(linear, dict.fromkeys("qkv", width), groups=heads)


def _grouped_query(linear: str, config: PretrainedConfig) -> Spans:
    """[q of all heads | k of all key heads | v]."""
    heads, kv_heads, width = _heads(config)
    return _side_by_side(linear, {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width})


def _falcon(linear: str, config: PretrainedConfig) -> Spans:
    heads, _, width = _heads(config)
    if config.new_decoder_architecture:  # for each key head, [its queries | k | v]
        groups = config.num_kv_heads
        return _side_by_side(linear, {"q": heads // groups * width, "k": width, "v": width}, groups=groups)
    if config.multi_query:  # [q of all heads | one k | one v]
        return _side_by_side(linear, {"q": heads * width, "k": width, "v": width})
    return _thirds_per_head(linear, config)


def _bigcode(linear: str, config: PretrainedConfig) -> Spans:
    heads, _, width = _heads(config)
    if config.multi_query:
        return _side_by_side(linear, {"q": heads * width, "k": width, "v": width})
    return _thirds_per_head(linear, config)


def _codegen(linear: str, config: PretrainedConfig) -> Spans:
    """Return the layout with four groups of heads (from training on four devices), [q | v | k]."""
    return _side_by_side(linear, dict.fromkeys("qvk", config.hidden_size // 4), groups=4)


def _dbrx(linear: str, config: PretrainedConfig) -> Spans:
    width, kv = config.d_model, config.attn_config.kv_n_heads * (config.d_model // config.n_heads)
    return _side_by_side(linear, {"q": width, "k": kv, "v": kv})


def _gated_query(linear: str, config: PretrainedConfig) -> Spans:
    """For each head, [q | gate]; keys and values have linear layers of their own."""
    heads, _, width = _heads(config)
    return {"q": Span(linear, heads, 0, width), "k": Span("k_proj"), "v": Span("v_proj")}


def _gated_latent_query(linear: str, config: PretrainedConfig) -> Spans:
    """For each head, [q | gate], and keys and values from a latent."""
    return {"q": Span(linear, config.num_attention_heads, 0, config.qk_nope_head_dim + config.qk_rope_head_dim)}


_LATENT = "its keys and values are unpacked from one latent vector, which the cache shares between heads"
_SHARED = "some of its layers attend to the keys and values of another layer, or use one projection for both"

LAYOUTS = (
    # A gate inside the query's projection. These rows precede the one that would treat all of it as the query.
    _fused(
        "q_proj",
        "o_proj",
        _gated_query,
        "qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen4_exp qwen4_exp_text",
    ),
    _fused("q_gate_proj", "o_proj", _gated_latent_query, "axk2", entry="kv_a_proj_with_mqa", note=_LATENT),
    # Four linear layers.
    _separate("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Qwen, Mistral, Gemma, …
    _separate("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, BART, GPT-J, LFM2, …
    _separate("q_proj", "k_proj", "v_proj", "dense"),  # Phi
    _separate("q_proj", "k_proj", "v_proj", "Wo"),  # ModernBERT's decoder
    _separate("Wq", "Wk", "Wv", "dense"),  # CTRL
    _separate("q_proj.linear", "k_proj.linear", "v_proj.linear", "o_proj.linear"),  # Inkling 2
    _separate("self.query", "self.key", "self.value", "output.dense", types=frozenset({"git"})),
    _separate("self.query", "self.key", "self.value", "output.dense", only_decoders=True),  # BERT and its kin
    # Keys and values that do not belong to one layer, or come from a latent.
    _query_and_output("q_b_proj", "o_proj", _LATENT, entry="kv_a_proj_with_mqa"),  # DeepSeek-V3
    _query_and_output("q_proj", "o_proj", _LATENT, entry="kv_a_proj_with_mqa"),  # DeepSeek-V2-Lite, Kimi-Linear
    _query_and_output("q_b_proj", "o_b_proj", _LATENT, entry="kv_proj", types=frozenset({"deepseek_v4"})),
    _query_and_output("q_proj", "o_proj", _SHARED, lacks=("v_proj",)),  # Gemma-3n, Gemma-4
    # One linear layer for several branches.
    _fused("query_key_value", "dense", _thirds_per_head, "bloom gpt_neox gpt_neox_japanese persimmon fuyu"),
    _fused("query_key_value", "dense", _falcon, "falcon"),
    _fused("qkv_proj", "o_proj", _grouped_query, "phi3 phi4_multimodal"),
    _fused("qkv_proj", "out_proj", _codegen, "codegen"),
    _fused("c_attn", "c_proj", _thirds, "gpt2"),
    _fused("c_attn", "c_proj", _bigcode, "gpt_bigcode"),
    _fused("Wqkv", "out_proj", _thirds, "mpt"),
    _fused("Wqkv", "out_proj", _dbrx, "dbrx"),
)

_SCAN = "no part of it is softmax attention: it keeps a recurrent state of its own"
_NO_CACHE = "it takes no cache, so that nothing carries a memory from call to call"
_OWN_CACHE = "it keeps its past in a cache of its own kind, which has no place for a memory"
_BOTH_WAYS = "its tokens see later ones"
_LOOPS = "it runs attention layers several times for a token"

# Model types of AutoModelForCausalLM that do not support a memory, with the reason.
UNSUPPORTED = {
    "blt": "it attends to patches of bytes, cut anew in every call",
    "cpmant": _BOTH_WAYS,
    "dory": _LOOPS,
    "falcon_mamba": _SCAN,
    "gemma4_assistant": "it reads the keys of another model",
    "gemma4_unified_assistant": "it reads the keys of another model",
    "hrm_text": _LOOPS,
    "inkling2_loop_text": _LOOPS,
    "jetmoe": "it routes queries to experts, and has no projection of its own for them",
    "mamba": _SCAN,
    "mamba2": _SCAN,
    "minimax": _OWN_CACHE,
    "moshi": "its attention mask and its sliding cache disagree when tokens come one by one",
    "musicgen": "it generates audio codes",
    "musicgen_melody": "it generates audio codes",
    "openai-gpt": _NO_CACHE,
    "prophetnet": _BOTH_WAYS,
    "recurrent_gemma": "it keeps the past of a conversation in its modules, and mixes conversations up",
    "reformer": _OWN_CACHE,
    "rwkv": _SCAN,
    "xlm": _NO_CACHE,
    "xlnet": _OWN_CACHE,
    "xlstm": _SCAN,
    "zaya": "its queries take part in its keys",
}
