"""A training step of the LoRA baseline: it learns from the same episodes, with the whole conversation in view."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamem_tool.io.atomic import folder_whole
from deltamem_tool.training.gradient_checkpointing import recomputing
from deltamem_tool.training.loss import scored_logits


class LoraStepModel(nn.Module):
    """One training step of a LoRA as a module. Only the LoRA's weights are registered."""

    conditions = ("",)
    accepts_loss_kwargs = True  # the Trainer then says how many tokens the whole batch scores

    def __init__(self, model: Any, recompute: bool = False) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.recompute = recompute
        self._model = (model,)  # in a tuple, so that it is no submodule

    @property
    def lora(self) -> Any:
        return self._model[0]

    def forward(
        self,
        full_ids: Tensor,
        full_mask: Tensor | None,
        full_scored: Tensor,
        targets: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> dict[str, Tensor]:
        """Cross-entropy of the answers `[N]` in whole conversations `[Q, F]`; `others` is what a memory would need."""
        self.lora.train(self.training)  # its dropout
        with recomputing(self.lora.get_base_model()) if self.recompute else contextlib.nullcontext():
            logits = scored_logits(self.lora, full_ids, full_mask, full_scored)
        tokens = len(targets) if num_items_in_batch is None else num_items_in_batch
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") / tokens
        return {"loss": loss, "answer": loss.detach()}

    @torch.no_grad()
    def views(self, batch: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Logits `[N, V]`, with the conversation in view."""
        self.lora.eval()
        yield "", scored_logits(self.lora, batch["full_ids"], batch["full_mask"], batch["full_scored"])

    def save(self, out: str | Path, overwrite: bool, files: Mapping[str, bytes]) -> None:
        """PEFT's adapter folder, whole or not at all, with `files` beside."""
        with folder_whole(out, overwrite) as staged:
            self.lora.save_pretrained(staged)
            for name, content in files.items():
                (staged / name).write_bytes(content)
