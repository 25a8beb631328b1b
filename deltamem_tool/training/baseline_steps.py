"""Training steps of the baselines that a memory is compared with.

A LoRA sees the whole conversation, a static adapter none of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem_tool.adapter.config_file import BaseModel
from deltamem_tool.baselines.lora import without_warnings
from deltamem_tool.baselines.static import StaticAdapter
from deltamem_tool.io.atomic import atomic_folder
from deltamem_tool.recipe.load import ObjectiveOptions
from deltamem_tool.training.gradient_checkpointing import recompute_layers
from deltamem_tool.training.loss import EpisodeModel, answer_loss, divergence, item_count, scored_logits


class LoraStepModel(nn.Module):
    """One training step of a LoRA, as a module. Only the LoRA's weights are registered."""

    conditions = ("",)
    accepts_loss_kwargs = True  # the Trainer then says how many tokens the whole batch scores

    def __init__(self, model: Any, recompute: bool = False) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.recompute = recompute
        self._model = (model,)  # in a tuple, so that it is not a submodule

    @property
    def lora(self) -> Any:
        """The LoRA's `peft.PeftModel`."""
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
        """Compute the loss of the answers `[N]` in whole conversations `[Q, F]`. `others` are for a memory."""
        self.lora.train(self.training)  # its dropout
        with recompute_layers(self.lora.get_base_model()) if self.recompute else contextlib.nullcontext():
            logits = scored_logits(self.lora, full_ids, full_mask, full_scored)
        loss = answer_loss(logits, targets, num_items_in_batch)
        return {"loss": loss, "answer": loss.detach().clone()}  # the Trainer changes the loss in place

    @torch.no_grad()
    def views(self, batch: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield logits `[N, V]`, with the conversation in the context."""
        self.lora.eval()
        yield "", scored_logits(self.lora, batch["full_ids"], batch["full_mask"], batch["full_scored"])

    def save(self, out: str | Path, overwrite: bool, files: Mapping[str, bytes]) -> None:
        """Write PEFT's adapter folder with the additional `files`, whole or not at all."""
        with atomic_folder(out, overwrite) as staged:
            with without_warnings():  # that the base has no config.json, where it is a GGUF file
                self.lora.save_pretrained(staged)
            for name, content in files.items():
                (staged / name).write_bytes(content)


class StaticStepModel(nn.Module):
    """One training step of a static adapter, as a module: the memory's read pass with a constant for every reading.

    Args:
        base: the model with `adapter`, without a memory; its own weights are frozen.
        adapter: the static adapter to train.
        made_for: the base model, as the saved folder records it.
        objective: terms to add to the cross-entropy of the answers; terms for writing have no effect.
        recompute: as in `EpisodeModel`.
    """

    conditions = ("",)
    accepts_loss_kwargs = True  # the Trainer then says how many tokens the whole batch scores

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: StaticAdapter,
        made_for: BaseModel | None = None,
        objective: ObjectiveOptions | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.adapter, self.made_for = adapter, made_for
        self.objective, self.recompute = objective or ObjectiveOptions(), recompute
        base.requires_grad_(False)
        self._base = (base,)  # in a tuple, so that it is not a submodule
        self._handles = adapter.attach_to(base)

    @property
    def base(self) -> PreTrainedModel:
        """The model with the adapter."""
        return self._base[0]

    def forward(
        self,
        read_ids: Tensor,
        read_mask: Tensor | None,
        scored: Tensor,
        targets: Tensor,
        full_ids: Tensor | None = None,
        full_mask: Tensor | None = None,
        full_scored: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> dict[str, Tensor]:
        """Compute the loss of the answers `[N]` of exchanges `[Q, T]`. `others` are for a memory."""
        with recompute_layers(self.base) if self.recompute else contextlib.nullcontext():
            logits = scored_logits(self.base, read_ids, read_mask, scored)
        loss = answer = answer_loss(logits, targets, num_items_in_batch)
        parts = {"answer": answer.detach().clone()}  # the Trainer changes the loss in place
        if self.objective.full_context_kl:
            assert full_ids is not None and full_scored is not None
            teacher = self.base_logits(full_ids, full_mask, full_scored)
            from_base = divergence(teacher, logits).sum() / item_count(targets, num_items_in_batch)
            loss, parts["kl"] = loss + self.objective.full_context_kl * from_base, from_base.detach()
        return {"loss": loss, **parts}

    @torch.no_grad()
    def base_logits(self, ids: Tensor, mask: Tensor | None, scored: Tensor) -> Tensor:
        """Compute the base model's logits `[N, V]`, with the whole history in the context."""
        for handle in self._handles:
            handle.remove()
        try:
            return scored_logits(self.base, ids, mask, scored)
        finally:
            self._handles = self.adapter.attach_to(self.base)

    @torch.no_grad()
    def views(self, batch: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield logits `[N, V]` of the exchanges."""
        yield "", scored_logits(self.base, batch["read_ids"], batch["read_mask"], batch["scored"])

    def save(self, out: str | Path, overwrite: bool, files: Mapping[str, bytes]) -> None:
        """Write the folder of the static adapter with the additional `files`, whole or not at all."""
        assert self.made_for is not None  # what is saved was made for a checkpoint
        self.adapter.save(out, self.made_for, overwrite, files)


Step = EpisodeModel | LoraStepModel | StaticStepModel  # what the Trainer trains
