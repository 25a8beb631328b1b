"""Every correction lands in its own branch. The witnesses are not the table's: what the model has put into its cache,
how its heads attend, and the parts that its own code makes of a fused linear layer, written out here once more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers.tiny import randomise
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PreTrainedModel

import deltamem_tool as deltamem
from base_model.tiny_configs import HEAD, HEADS, HIDDEN, TEXT_IDS, tiny_config
from deltamem_tool import DeltaMemConfig, MemoryCache
from deltamem_tool.base_model.attention import AttentionLayer, attention_layers
from deltamem_tool.base_model.layouts import LAYOUTS
from deltamem_tool.errors import ArchitectureError
from deltamem_tool.memory.attach import adapter_of

DIFFERENT = 1e-4  # more than rounding explains, for numbers of order 1
LENGTH = 6
KV_HEADS = HEADS // 2

Parts = Mapping[str, Tensor]  # of a linear layer's output, `[B, T, ·]`, including those that are not a branch


def named(names: str, parts: tuple[Tensor, ...] | list[Tensor]) -> Parts:
    """Heads beside each other, as attention counts them."""
    return {name: part.flatten(2) for name, part in zip(names.split(), parts, strict=True)}


def per_head(output: Tensor) -> Parts:
    """gpt_neox: `qkv.view(B, T, heads, 3 * head_dim).chunk(3, -1)`; its Japanese kin slices at the same places."""
    return named("q k v", output.view(*output.shape[:2], HEADS, 3 * HEAD).chunk(3, dim=-1))


def per_head_stacked(output: Tensor) -> Parts:
    """bloom, persimmon, and falcon without multi-query: `view(B, T, heads, 3, head_dim)[..., 0, :]`, 1, 2."""
    stacked = output.view(*output.shape[:2], HEADS, 3, HEAD)
    return named("q k v", [stacked[..., part, :] for part in range(3)])


def falcon_new(output: Tensor) -> Parts:
    qkv = output.view(*output.shape[:2], -1, HEADS // KV_HEADS + 2, HEAD)
    return named("q k v", (qkv[:, :, :, :-2], qkv[:, :, :, [-2]], qkv[:, :, :, [-1]]))


def falcon_multi_query(output: Tensor) -> Parts:
    qkv = output.view(*output.shape[:2], HEADS + 2, HEAD)
    return named("q k v", (qkv[..., :-2, :], qkv[..., [-2], :], qkv[..., [-1], :]))


def grouped(output: Tensor) -> Parts:
    """phi3: slices at the ends of the queries and of the keys; dbrx splits there."""
    end = HEADS * HEAD
    return named(
        "q k v", (output[..., :end], output[..., end : end + KV_HEADS * HEAD], output[..., -KV_HEADS * HEAD :])
    )


def codegen(output: Tensor) -> Parts:
    """Query, value, key, in this order."""
    return named("q v k", output.reshape(*output.shape[:2], 4, -1).split(HEAD * HEADS // 4, dim=-1))


def gpt2(output: Tensor) -> Parts:
    return named("q k v", output.split(HIDDEN, dim=2))


def bigcode_multi_query(output: Tensor) -> Parts:
    return named("q k v", output.split((HIDDEN, HEAD, HEAD), dim=2))


def bigcode(output: Tensor) -> Parts:
    heads = output.view(*output.shape[:2], HEADS, 3 * HEAD).transpose(1, 2).split(3 * [HEAD], dim=3)
    return named("q k v", [part.transpose(1, 2) for part in heads])


def mpt(output: Tensor) -> Parts:
    return named("q k v", output.chunk(3, dim=2))


def gated(output: Tensor) -> Parts:
    """qwen3_next."""
    return named("q gate", output.view(*output.shape[:2], -1, HEAD * 2).chunk(2, dim=-1))


def gated_latent(output: Tensor) -> Parts:
    """axk2: a query of the two sizes that its key has, and a gate as wide as a value."""
    return named("q gate", output.view(*output.shape[:2], -1, 3 * HEAD).split([2 * HEAD, HEAD], dim=-1))


@dataclass(frozen=True)
class Case:
    """A model type, and how its code splits a linear layer that holds more than one branch."""

    model_type: str
    fused: str = ""  # name of that layer in the attention module
    parts: Callable[[Tensor], Parts] | None = None
    branches: str = "qkvo"
    changes: Mapping[str, object] = field(default_factory=dict)  # of the config

    def model(self, device: str = "cpu") -> PreTrainedModel:
        torch.manual_seed(0)
        config = tiny_config(self.model_type)
        for name, value in self.changes.items():
            setattr(config, name, value)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()

    def layer(self, model: PreTrainedModel) -> AttentionLayer:
        """The first layer with exactly these branches. In gemma4, later layers read the keys of the first ones."""
        layers = attention_layers(model)
        return next(layer for layer in layers if "".join(layer.projections) == self.branches)

    @property
    def name(self) -> str:
        return " ".join([self.model_type, *(f"{name}={value}" for name, value in self.changes.items())])


FALCON = ("falcon", "query_key_value")
CASES = [
    # one linear layer for several branches, and every type that has it
    Case("gpt_neox", "query_key_value", per_head),
    Case("gpt_neox_japanese", "query_key_value", per_head),
    Case("bloom", "query_key_value", per_head_stacked),
    Case("persimmon", "query_key_value", per_head_stacked),
    Case("fuyu", "query_key_value", per_head_stacked),
    Case(*FALCON, falcon_new, changes={"new_decoder_architecture": True}),
    Case(*FALCON, falcon_multi_query, changes={"new_decoder_architecture": False, "multi_query": True}),
    Case(
        *FALCON,
        per_head_stacked,
        changes={"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": HEADS},
    ),
    Case("phi3", "qkv_proj", grouped),
    Case("phi4_multimodal", "qkv_proj", grouped),
    Case("codegen", "qkv_proj", codegen),
    Case("gpt2", "c_attn", gpt2),
    Case("gpt_bigcode", "c_attn", bigcode_multi_query, changes={"multi_query": True}),
    Case("gpt_bigcode", "c_attn", bigcode, changes={"multi_query": False}),
    Case("mpt", "Wqkv", mpt),
    Case("dbrx", "Wqkv", grouped),
    Case("qwen3_next", "q_proj", gated),
    Case("qwen3_5", "q_proj", gated),
    Case("qwen3_5_text", "q_proj", gated),
    Case("qwen3_5_moe", "q_proj", gated),
    Case("qwen3_5_moe_text", "q_proj", gated),
    Case("qwen4_exp", "q_proj", gated),
    Case("qwen4_exp_text", "q_proj", gated),
    Case("axk2", "q_gate_proj", gated_latent, "qo"),
    # one for each
    Case("qwen3"),
    Case("opt"),
    Case("gptj"),
    Case("phi"),
    Case("modernbert-decoder"),
    Case("ctrl"),
    Case("git"),
    Case("bert"),
    Case("inkling2_text"),
    # keys and values that cannot be corrected separately
    Case("deepseek_v2", branches="qo"),
    Case("deepseek_v3", branches="qo"),
    Case("kimi_linear", branches="qo"),
    Case("deepseek_v4", branches="qo"),
    Case("gemma3n_text", branches="qo"),
    Case("gemma4_text", branches="qo"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_fused = pytest.mark.parametrize("case", [case for case in CASES if case.parts], ids=lambda case: case.name)


def text() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (2, LENGTH), generator=generator)


def record(module: nn.Module, into: list[Any]) -> RemovableHandle:
    """Append the module's output, after all hooks before this one."""
    return module.register_forward_hook(lambda module, args, output: into.append(output))


@torch.no_grad()
def seen(model: PreTrainedModel, layer: AttentionLayer) -> SimpleNamespace:
    """The logits, how one layer attends and what it gives on, and what it and those before it have put into the
    cache."""
    inner, outer = [], []
    handles = [record(getattr(layer.module, "self", layer.module), inner), record(layer.module, outer)]  # BERT has two
    cache = MemoryCache(model)
    logits = model(text(), cache=cache).logits
    for handle in handles:
        handle.remove()
    attends, gives = inner[0][1], outer[0] if isinstance(outer[0], Tensor) else outer[0][0]
    assert attends.ndim == 4 and gives.ndim == 3  # batch, heads, queries, keys; and batch, tokens, width
    caches = [part for part in cache.layers[: layer.index + 1] if getattr(part, "keys", None) is not None]
    keys, values = (torch.cat([getattr(part, name).flatten() for part in caches]) for name in ("keys", "values"))
    return SimpleNamespace(logits=logits, keys=keys, values=values, attends=attends, gives=gives)


# What a correction of each branch changes in its own layer, besides the layer's output.
MOVES = {"q": {"attends"}, "k": {"attends", "keys"}, "v": {"values"}, "o": set()}


@every_case
def test_a_correction_changes_only_its_branch(case: Case):
    model = case.model()
    layer = case.layer(model)
    deltamem.attach(model, DeltaMemConfig(rank=4, branches=tuple(case.branches), layers=(layer.index,)))
    fresh = seen(model, layer)
    deltamem.detach(model)
    for branch in case.branches:
        randomise(deltamem.attach(model, DeltaMemConfig(rank=4, branches=(branch,), layers=(layer.index,))))
        corrected = seen(model, layer)
        deltamem.detach(model)
        for name in ("keys", "values", "attends", "gives", "logits"):
            before, after = getattr(fresh, name), getattr(corrected, name)
            if name in {*MOVES[branch], "gives", "logits"}:
                assert (after - before).abs().max() > DIFFERENT, f"a correction of {branch} does not move {name}"
            else:
                assert torch.equal(after, before), f"a correction of {branch} moves {name}"


@every_fused
@torch.no_grad()
def test_a_part_of_a_fused_layer_changes_by_delta_r(case: Case):
    model = case.model()
    layer = case.layer(model)
    linear, moved = layer.module.get_submodule(case.fused), set()
    for branch in layer.projections:
        config = DeltaMemConfig(rank=4, branches=(branch,), layers=(layer.index,))
        put_out, readings = [], []
        handles = [record(linear, put_out)]
        memory = randomise(deltamem.attach(model, config)).layer(layer.index)  # its hook runs between these two
        handles += [record(linear, put_out), record(memory, readings)]
        model(text(), cache=MemoryCache(model))
        for handle in handles:
            handle.remove()
        reading = readings[0][0]  # and the state, which nothing here depends on
        assert reading.abs().max() > DIFFERENT
        steer = F.linear(reading * config.scale, memory.delta_of(branch).weight)
        deltamem.detach(model)

        before, after = (case.parts(output) for output in put_out)
        for name in before:
            expected = before[name] + steer if name == branch else before[name]
            torch.testing.assert_close(after[name], expected, atol=1e-6 if name == branch else 0, rtol=0)
        moved |= {branch} & set(before)
    assert moved == {*before} - {"gate"}


@every_case
def test_place_and_take_are_inverse(case: Case):
    for projection in case.layer(case.model()).projections.values():
        branch = torch.randn(2, 3, projection.out_features)
        placed = projection.place(branch)
        output = projection.linear(torch.zeros(2, 3, projection.in_features))
        assert placed.shape == output.shape and torch.equal(projection.take(placed), branch)
        assert placed.count_nonzero() == branch.count_nonzero(), "something is outside of the branch"
        whole = torch.randn_like(placed)
        rest = whole - projection.place(projection.take(whole))
        assert projection.take(rest).count_nonzero() == 0
        assert projection.is_whole == (rest.count_nonzero() == 0)


@every_fused
def test_branches_do_not_overlap(case: Case):
    by_layer: dict[str, Tensor] = {}
    for projection in case.layer(case.model()).projections.values():
        taken = projection.place(torch.ones(projection.out_features))
        by_layer[projection.name] = by_layer.get(projection.name, torch.zeros_like(taken)) + taken
    for name, taken in by_layer.items():
        assert taken.max() == 1, f"{name}: two branches share columns"
        assert taken.min() == 1 or case.parts in (gated, gated_latent), f"{name}: columns of no branch"


def test_every_row_has_a_case():
    used, types = set(), set()
    for case in CASES:
        model = case.model("meta")
        names = frozenset({model.config.model_type, model.config.get_text_config(decoder=True).model_type})
        module = case.layer(model).module
        used.add(next(i for i, layout in enumerate(LAYOUTS) if layout.is_of(names) and layout.fits(module)))
        types |= {case.model_type}
    unused = {LAYOUTS[i].linears for i in set(range(len(LAYOUTS))) - used}
    # transformers 5.23 has Inkling 2 with four linear layers like the others.
    newer = {("q_proj.linear", "k_proj.linear", "v_proj.linear", "o_proj.linear")}
    assert unused == (newer if Version(transformers.__version__) < Version("5.24") else set())
    assert {name for layout in LAYOUTS for name in layout.types} <= types


@every_fused
def test_an_unknown_fused_layer_raises(case: Case):
    """The same modules under a new name: the order of its outputs is unknown."""
    model = case.model("meta")
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.__class__ = type("NewConfig", (type(config),), {"model_type": "newcomer"})
    with pytest.raises(ArchitectureError, match=r"newcomer.* (is not known|does not have the layout)"):
        deltamem.attach(model)
    with pytest.raises(ArchitectureError, match="no memory"):
        adapter_of(model)
