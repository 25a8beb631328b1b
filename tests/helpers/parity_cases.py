"""The reference implementation's numbers, and its adapters on our models. See parity/README.md."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from deltamem_tool import convert, load

FOLDER = Path(__file__).parents[1] / "parity"
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


@dataclass(frozen=True)
class Call:
    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, P + T]
    logits: Tensor  # [B, T, V]
    states: dict[int, Tensor]  # [B, H, R, R] by layer
    fresh_kv_cache: bool
    writes: bool
    one_message: bool  # the call is a segment

    @property
    def valid(self) -> Tensor:
        """[B, T], the tokens of this call that are not padding."""
        return self.attention_mask[:, -self.input_ids.shape[1] :].bool()


def load_model(case: str, attention: str) -> PreTrainedModel:
    """The case's base model with the reference's adapter on it, converted to ours."""
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "adapter"
        convert(FOLDER / case / "adapter", converted, base=str(FOLDER / case / "base"))
        return load(converted, attn_implementation=attention)


def load_calls(case: str) -> list[Call]:
    content = json.loads((FOLDER / case / "case.json").read_text())
    tensors = load_file(FOLDER / case / "case.safetensors")
    calls = []
    for index, call in enumerate(content["calls"]):
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
