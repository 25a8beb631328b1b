"""The training loss (arXiv 2605.12357, section 3.4).

`EpisodeModel` writes the histories, answers from the memory alone, and returns the cross-entropy of the answers plus
the terms of the objective.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem_tool._compat import DynamicLayer, DynamicSlidingWindowLayer
from deltamem_tool.adapter.save import save_adapter
from deltamem_tool.memory.attach import adapter_of, decoder_of
from deltamem_tool.memory.attachment import hf_model
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.decoder_call import without_memory
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.recipe.load import ObjectiveOptions
from deltamem_tool.training.addressing import Addresses, HiddenStates, addressing_loss, hidden_states_of
from deltamem_tool.training.gradient_checkpointing import recompute_layers
from deltamem_tool.training.sharding import is_sharded, pad_to_common_length, pass_gradients

# What an answer is told from: the memory of its conversation, zeros, another conversation's memory.
CONDITIONS = ("", "_zero", "_donor")


class WriteResult(NamedTuple):
    """The result of a write pass.

    Args:
        memory: memory of B conversations.
        gates: `[B, L]`, the mean β of each conversation's writes, by layer.
        history_kl: `[B]`, the mean divergence from the base model over each conversation's tokens; None if it has no
            weight in the objective.
    """

    memory: MemoryState
    gates: Tensor
    history_kl: Tensor | None = None


class EpisodeModel(nn.Module):
    """One training step, as a module. Only the adapter is registered, so the Trainer trains, moves and saves only it.

    Args:
        base: the model with a memory.
        objective: terms to add to the cross-entropy of the answers.
        write_chunk: split the write pass into calls of this many tokens, counted from the end; None makes one call.
        bptt: backpropagate through only this many of the last chunks; None means all.
        recompute: keep only the inputs of the layers, and run each layer again in the backward pass.
    """

    conditions = CONDITIONS
    addresses = staticmethod(Addresses.from_batch)
    accepts_loss_kwargs = True  # the Trainer then says how many tokens the whole batch scores

    def __init__(
        self,
        base: PreTrainedModel,
        objective: ObjectiveOptions | None = None,
        write_chunk: int | None = None,
        bptt: int | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.adapter = adapter_of(base)
        self.objective = objective or ObjectiveOptions()
        self.write_chunk, self.bptt, self.recompute = write_chunk, bptt, recompute
        self._base = (base,)  # in a tuple, so that it is not a submodule

    @property
    def base(self) -> PreTrainedModel:
        """The model with a memory."""
        return self._base[0]

    def forward(
        self,
        write_ids: Tensor,
        write_mask: Tensor | None,
        read_ids: Tensor,
        read_mask: Tensor | None,
        labels: Tensor,
        scored: Tensor,
        targets: Tensor,
        rows: Tensor,
        write_segment_tags: Tensor | None = None,
        full_ids: Tensor | None = None,
        full_mask: Tensor | None = None,
        full_scored: Tensor | None = None,
        unrelated_ids: Tensor | None = None,
        unrelated_mask: Tensor | None = None,
        unrelated_scored: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        conversations: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch, whose tensors are documented at `data.collate.collate`.

        Args:
            write_ids: `[B, W]`.
            write_mask: `[B, W]`.
            read_ids: `[Q, T]`.
            read_mask: `[Q, T]`.
            labels: `[Q, T]`; the Trainer counts the scored tokens in them.
            scored: `[N]`.
            targets: `[N]`.
            rows: `[Q]`.
            write_segment_tags: `[B, W]`, if the memory writes by segments.
            full_ids: `[Q, F]`, for the divergence.
            full_mask: `[Q, F]`.
            full_scored: `[N]`.
            unrelated_ids: `[B, U]`, exchanges that need no memory.
            unrelated_mask: `[B, U]`.
            unrelated_scored: `[M]`.
            num_items_in_batch: number of scored tokens to average the loss over, in all micro-batches and processes of
                one step; by default those of this batch.
            conversations: the same for terms that are averaged over conversations.

        Returns:
            `loss` and, detached, its parts: `answer`, `gates` (the mean β of the writes, `[L]`), and `sparsity`, `kl`,
            `history_kl`, `unrelated_kl` and `addressing` if they have a weight.
        """
        with self._layers(), self.adapter.in_training(), self._hidden_states() as hidden:
            memory, gates, history_kl = self.write(write_ids, write_mask, write_segment_tags)
            written = hidden.take()
            logits = self.answer(memory.select(rows), read_ids, read_mask, scored)
            read = hidden.take()
            others = None  # logits `[M, V]` of what no memory is needed for
            if self.objective.unrelated_kl:
                assert unrelated_ids is not None and unrelated_scored is not None
                others = self.answer(memory, unrelated_ids, unrelated_mask, unrelated_scored)
        loss = answer = answer_loss(logits, targets, num_items_in_batch)
        parts = {"gates": gates.mean(0)}
        count = len(gates) if conversations is None else conversations
        if self.objective.write_sparsity:
            parts["sparsity"] = (gates - self.objective.write_target).square().mean(1).sum() / count
            loss = loss + self.objective.write_sparsity * parts["sparsity"]
        if history_kl is not None:
            parts["history_kl"] = history_kl.sum() / count
            loss = loss + self.objective.history_kl * parts["history_kl"]
        if self.objective.addressing:
            addresses = self.addresses(write_ids, write_mask, read_ids, scored, targets, rows, write_segment_tags)
            parts["addressing"] = addressing_loss(self.adapter, written, read, write_mask, addresses).sum() / count
            loss = loss + self.objective.addressing * parts["addressing"]
        if self.objective.full_context_kl:
            assert full_ids is not None and full_scored is not None
            teacher = self.base_logits(full_ids, full_mask, full_scored)
            parts["kl"] = divergence(teacher, logits).sum() / item_count(targets, num_items_in_batch)
            loss = loss + self.objective.full_context_kl * parts["kl"]
        if others is not None:
            assert unrelated_ids is not None and unrelated_scored is not None
            teacher = self.base_logits(unrelated_ids, unrelated_mask, unrelated_scored)
            means = _row_means(divergence(teacher, others), unrelated_scored, unrelated_ids)
            parts["unrelated_kl"] = means.sum() / count
            loss = loss + self.objective.unrelated_kl * parts["unrelated_kl"]
        # A copy: the Trainer multiplies the loss in place by the number of processes.
        answer = answer.detach().clone()
        return {"loss": loss, "answer": answer, **{name: part.detach() for name, part in parts.items()}}

    def write(self, ids: Tensor, mask: Tensor | None, segments: Tensor | None = None) -> WriteResult:
        """Write histories `[B, W]`.

        Writing in chunks computes the same as a single call, since the KV cache is carried over. Gradients flow through
        the last `bptt` chunks.
        """
        diverges = self.objective.history_kl > 0 and torch.is_grad_enabled()
        sharded = is_sharded(self.base)
        # Without logits, unless they are compared; FSDP gathers weights in calls of the whole model alone.
        decoder = self.base if diverges or sharded else self.base.base_model
        if sharded and self.write_chunk is not None:
            ids, mask, segments = pad_to_common_length(ids, mask, segments)
        cache, of_base = MemoryCache(self.base), MemoryCache(self.base)
        cache.write_gates = {}
        length = ids.shape[1]
        chunk = self.write_chunk or length
        first = length - (length - 1) // chunk * chunk  # the last chunk is a whole one, so that gradients get their due
        bounds = [0, *range(first, length + 1, chunk)]
        chunks = list(itertools.pairwise(bounds))
        positions = {}
        if len(chunks) == 1:
            cache.layers, of_base.layers = (
                [_pass_through(layer) for layer in each.layers] for each in (cache, of_base)
            )
        elif self.bptt is not None and mask is not None and all(map(_has_only_keys_and_values, cache.layers)):
            # Recurrent layers read padding that comes first; theirs stays last, and short rows learn from fewer tokens.
            ids, mask, segments = _move_padding_right(ids, mask, segments)
            if "position_ids" in inspect.signature(self.base.base_model.forward).parameters:
                positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        divergences, ends = [], []  # [B, T] of each chunk; logits of those that learn
        for number, (start, end) in enumerate(chunks):
            learns = self.bptt is None or number >= len(chunks) - self.bptt
            cache.segment_tags = None if segments is None else segments[:, start:end]
            inputs = {
                "input_ids": ids[:, start:end],
                "attention_mask": None if mask is None else mask[:, :end],
                "use_cache": True,
                **{name: value[:, start:end] for name, value in positions.items()},
            }
            some = _one_token(ids[:, start:end], mask, start) if sharded and not diverges else None
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns), logits_at(self.base, some):
                output = decoder(cache=cache, **inputs)
            if sharded and output.logits.requires_grad:
                ends.append(output.logits)
            if diverges:
                with torch.no_grad(), without_memory():
                    teacher = self.base(cache=of_base, **inputs).logits
                divergences.append(divergence(teacher, output.logits))
        assert cache.memory is not None  # the call has made one
        # A layer without an entry has not written: in no conversation a segment ended.
        nothing = ids.new_zeros(len(ids), 2, dtype=torch.float32)
        gates = torch.stack([cache.write_gates.get(layer, nothing) for layer in self.adapter.layer_indices], dim=1)
        means = gates[..., 0] / gates[..., 1].clamp_min(1.0)
        memory = pass_gradients(ends, cache.memory) if ends else cache.memory
        return WriteResult(memory, means, _token_mean(torch.cat(divergences, dim=1), mask) if diverges else None)

    def answer(self, memory: MemoryState, ids: Tensor, mask: Tensor | None, scored: Tensor) -> Tensor:
        """Read exchanges `[Q, T]`, each with its row of `memory`, and return logits `[N, V]` at the positions `scored`.

        The positions are flat, `[N]`.

        The read pass has its own KV cache, starts at position 0 and does not write.
        """
        cache = MemoryCache(self.base, write=False)
        cache.memory = memory  # not checked for NaN: the Trainer tells a run that diverged by its loss
        cache.layers = [_pass_through(layer) for layer in cache.layers]
        return scored_logits(self.base, ids, mask, scored, cache)

    @torch.no_grad()
    def base_logits(self, ids: Tensor, mask: Tensor | None, scored: Tensor) -> Tensor:
        """Compute the base model's logits `[N, V]`, without a memory."""
        with without_memory():
            return scored_logits(self.base, ids, mask, scored)

    @torch.no_grad()
    def views(self, batch: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield logits `[N, V]` under each of `CONDITIONS`, for a batch of two conversations or more."""
        memory = self.write(batch["write_ids"], batch["write_mask"], batch.get("write_segment_tags")).memory
        rows, empty = batch["rows"], self.adapter.empty_memory(memory.batch_size)
        memories = (memory.select(rows), empty.select(rows), memory.select((rows + 1) % memory.batch_size))
        read = (batch["read_ids"], batch["read_mask"], batch["scored"])
        for name, memory in zip(CONDITIONS, memories, strict=True):
            yield name, self.answer(memory, *read)

    def save(self, out: str | Path, overwrite: bool, files: Mapping[str, bytes]) -> None:
        """Write the adapter folder with the additional `files`, whole or not at all."""
        save_adapter(self.base, out, overwrite, files)

    def _hidden_states(self) -> contextlib.AbstractContextManager[HiddenStates]:
        """Record the hidden states of written and read tokens in the block, if they are compared."""
        return hidden_states_of(self.adapter) if self.objective.addressing else contextlib.nullcontext(HiddenStates())

    def _layers(self) -> contextlib.AbstractContextManager[None]:
        return recompute_layers(self.base) if self.recompute else contextlib.nullcontext()


def answer_loss(logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Return the cross-entropy of logits `[N, V]`, summed over tokens and divided by `num_items`, by default N."""
    return F.cross_entropy(logits.float(), targets, reduction="sum") / item_count(targets, num_items)


def item_count(targets: Tensor, num_items: Tensor | int | None) -> Tensor | int:
    """Return the number of items to average the loss over: `num_items`, by default the number of targets."""
    return len(targets) if num_items is None else num_items


def scored_logits(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None, scored: Tensor, cache: MemoryCache | None = None
) -> Tensor:
    """Compute logits `[N, V]` at the flat positions `scored` `[N]` of texts `[B, T]`.

    They come from the model's own head, with everything it does to its logits, but computed only at these positions.
    """
    options = {} if cache is None else {"cache": cache}
    with logits_at(model, scored):
        output = cast(nn.Module, model)(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **options)
    logits: Tensor = output.logits.squeeze(0)
    return logits


@contextlib.contextmanager
def logits_at(model: PreTrainedModel, scored: Tensor | None) -> Iterator[None]:
    """Compute logits `[1, N, V]` only at the flat positions `scored` `[N]`, inside the block; None means all."""

    def select(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if scored is not None:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[scored].unsqueeze(0)
        return output

    handle = decoder_of(hf_model(model)).register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _one_token(ids: Tensor, mask: Tensor | None, start: int) -> Tensor:
    """The flat position `[1]` of a token of `ids` `[B, T]` that is not padding; they begin at `start` of the mask."""
    if mask is None:
        return ids.new_zeros(1)
    return mask[:, start : start + ids.shape[1]].flatten().argmax().view(1)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) per token `[...]`, from logits `[..., V]`."""
    target, answer = (F.log_softmax(logits.float(), dim=-1) for logits in (teacher, student))
    return F.kl_div(answer, target, reduction="none", log_target=True).sum(-1)


def _token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean `[B]` of values `[B, W]` over the tokens that are not padding."""
    if mask is None:
        return values.mean(1)
    return (values * mask).sum(1) / mask.sum(1)


def _row_means(values: Tensor, scored: Tensor, ids: Tensor) -> Tensor:
    """The mean `[B]` of values `[M]` at the flat positions `scored` `[M]` of `ids` `[B, U]`."""
    rows = scored // ids.shape[1]
    sums, counts = (values.new_zeros(len(ids)).index_add(0, rows, each) for each in (values, torch.ones_like(values)))
    return sums / counts


def _move_padding_right(ids: Tensor, mask: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Move padding `[B, W]` from the right to the left: the last tokens of all rows are then side by side."""
    length = ids.shape[1]
    columns = torch.arange(length, device=ids.device)
    source = (columns + mask.sum(1, keepdim=True)) % length  # [B, W]
    return ids.gather(1, source), mask.gather(1, source), None if segments is None else segments.gather(1, source)


class _PassThroughLayer(DynamicLayer):  # type: ignore[misc]  # _compat gives its names as Any
    """A cache layer for a call that no other follows: keys and values go through, and nothing keeps them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def _has_only_keys_and_values(layer: Any) -> bool:
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def _pass_through(layer: Any) -> Any:
    """Layers that hold more than keys and values stay what they are."""
    if not _has_only_keys_and_values(layer):
        return layer
    passing = _PassThroughLayer()
    passing.is_sliding = layer.is_sliding  # transformers looks at it when it makes masks
    return passing
