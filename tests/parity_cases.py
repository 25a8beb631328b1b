"""The reference implementation's numbers, and its adapters on our models. See parity/README.md."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltamem_tool import DeltaMemConfig, attach

FOLDER = Path(__file__).parent / "parity"
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
REFERENCE_NAMES = {
    "memory_q_proj": "query.weight",
    "memory_k_proj": "key.weight",
    "memory_v_proj": "value.weight",
    "beta_proj": "gate.weight",
    "beta_bias": "gate.bias",
    "lambda_proj": "decay.weight",
    "lambda_bias": "decay.bias",
    "delta_scale_raw": "scale_raw",
    "delta_o_rmsnorm_weight": "o_norm.weight",
    **{f"delta_{head}_proj": f"delta.{head}.weight" for head in "qkvo"},
}


@dataclass(frozen=True)
class Call:
    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, P + T]
    logits: Tensor  # [B, T, V]
    states: dict[int, Tensor]  # [B, H, R, R] by layer
    fresh_kv_cache: bool
    writes: bool
    one_message: bool  # the call is a segment by itself

    @property
    def valid(self) -> Tensor:
        """[B, T], the tokens of this call that are no padding."""
        return self.attention_mask[:, -self.input_ids.shape[1] :].bool()


def load_model(case: str, attention: str) -> PreTrainedModel:
    """The case's base model with the reference's adapter on it."""
    folder = FOLDER / case
    said = json.loads((folder / "adapter" / "delta_mem_config.json").read_text())
    config = DeltaMemConfig(
        rank=said["rank"],
        state_heads=said["num_state_heads"],
        heads=tuple(said["delta_heads"]),
        alpha=said["alpha"],
        update_rule=said["state_update_mode"],
        layers=tuple(said["target_layers"]) or "all",
        granularity={"token": "token", "message_mean": "message"}[said["memory_write_granularity"]],
        couple_lambda=said["couple_lambda"],
        gates="row" if said["rankwise_gates"] else "head",
        delta_scale={"layer": "layer", "head": "branch"}[said["delta_scale_granularity"]]
        if said["trainable_delta_scale"]
        else "fixed",
        delta_scale_max=said["delta_scale_max"],
        o_norm=said["delta_o_rmsnorm"],
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation=attention).eval()
    adapter = attach(model, config)
    weights = torch.load(folder / "adapter" / "delta_mem_adapter.pt", weights_only=True)
    renamed = {}
    for name, weight in weights.items():
        _, _, layer, _, tensor = name.split(".")
        ours = f"layers.{layer}.{REFERENCE_NAMES[tensor]}"
        if ours in adapter.state_dict():  # the reference also stores the Δ of branches that are off
            renamed[ours] = weight
    adapter.load_state_dict(renamed)
    return model


def load_calls(case: str) -> list[Call]:
    said = json.loads((FOLDER / case / "case.json").read_text())
    tensors = load_file(FOLDER / case / "case.safetensors")
    calls = []
    for index, call in enumerate(said["calls"]):
        prefix = f"call{index}."
        states = {
            int(name.removeprefix(f"{prefix}state.")): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{prefix}state.")
        }
        of_call = {name: tensors[prefix + name] for name in ("input_ids", "attention_mask", "logits")}
        how = {name: call[name] for name in ("fresh_kv_cache", "writes", "one_message")}
        calls.append(Call(**of_call, **how, states=states))
    return calls
