"""The model under evaluation: an adapter in PyTorch, or an ONNX folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool.base_model.tokenizer import read_tokenizer
from deltamem_tool.chat.engine import Engine, empty_memory
from deltamem_tool.chat.generation import answer_prompts
from deltamem_tool.chat.torch_engine import TorchModel
from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation.conditions import NEVER_WRITTEN, ONNX, PYTORCH, SCALE_ZERO, Condition
from deltamem_tool.evaluation.memories import take_rows
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.decoder_call import without_memory
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.segments.encode import RENDERED

if TYPE_CHECKING:
    from deltamem_tool.memory.adapter import DeltaMemAdapter


@dataclass(frozen=True)
class Subject:
    """A model with a memory, in one of the runtimes.

    Attributes:
        engine: the engine that runs it.
        tokenizer: its tokenizer, with a chat template.
        model: the PyTorch model; None for an ONNX folder.
        write: whether questions and answers write into the memory, as in a conversation.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | None
    write: bool = False

    @classmethod
    def from_model(
        cls, model: PreTrainedModel | Engine, tokenizer: PreTrainedTokenizerBase | None, write: bool = False
    ) -> Subject:
        """Make a subject from a model with a memory and its tokenizer, or from an `OnnxModel`, which has its own.

        Raises:
            ArchitectureError: the tokenizer of the ONNX folder cannot be read.
            ConfigError: a PyTorch model has no tokenizer; or questions are to write, but the memory writes by segments.
        """
        if not isinstance(model, PreTrainedModel):
            subject = cls(model, tokenizer or read_tokenizer(getattr(model, "folder", "")), None, write)
        elif tokenizer is None:
            raise ConfigError(
                "Evaluating a PyTorch model needs its tokenizer.", "None was passed.", "Pass `tokenizer`."
            )
        else:
            subject = cls(TorchModel(model, tokenizer), tokenizer, model, write)
        granularity = subject.engine.mechanism.granularity
        if write and granularity != "token":
            raise ConfigError(
                "Questions cannot write into this memory.",
                f"It writes {granularity} by {granularity}, and prompts have no mark where a {granularity} ends.",
                "Leave out --write (write=True), or evaluate an adapter that writes at every token.",
            )
        return subject

    @property
    def runtime(self) -> str:
        """PYTORCH or ONNX."""
        return ONNX if self.model is None else PYTORCH

    @property
    def positions(self) -> int | None:
        """Maximum number of tokens in a context; None for no limit."""
        return self.engine.max_length

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text. The template has already written all special tokens."""
        ids: list[list[int]] = self.tokenizer(list(texts), **RENDERED).input_ids
        return ids

    def ask(
        self, prompts: Sequence[str], memory: StoredMemory | None, condition: Condition, max_new_tokens: int
    ) -> list[str]:
        """Answer prompts greedily. They read the memory, and write if `writes` says so.

        Args:
            prompts: rendered prompts, with the header of the answer.
            memory: a row for each prompt; None for zeros.
            condition: the condition under which the model answers.
            max_new_tokens: maximum length of an answer, in tokens.

        Returns:
            The answers, without surrounding whitespace.
        """
        with self.apply_condition(condition):
            rows = self.memory_for(memory, len(prompts))
            answers = answer_prompts(self.engine, rows, self.tokens(prompts), max_new_tokens, self.writes(condition))
        texts = (self.tokenizer.decode(list(answer.tokens), skip_special_tokens=True) for answer in answers)
        return [str(text).strip() for text in texts]

    def writes(self, condition: Condition) -> bool:
        """Return whether questions and answers write under a condition; they never do with the base model alone."""
        return self.write and condition.memory not in (None, NEVER_WRITTEN)

    def memory_for(self, memory: StoredMemory | None, rows: int) -> StoredMemory:
        """Return `memory`, or zeros, bound to the adapter as it is now: with Δ = 0 it has another fingerprint."""
        if memory is None:
            memory = take_rows(empty_memory(self.engine), [0] * rows)
        return memory if self.model is None else replace(memory, adapter=adapter_of(self.model).fingerprint)

    @contextmanager
    def apply_condition(self, condition: Condition) -> Iterator[None]:
        """Change the model to the condition inside the block: without adapter, with another one, or with Δ = 0."""
        if self.model is None:
            yield
            return
        with apply_condition(self.model, condition):
            yield


@contextmanager
def apply_condition(model: PreTrainedModel, condition: Condition) -> Iterator[None]:
    """Change a PyTorch model as `Subject.apply_condition` does."""
    if condition.memory is None:
        with without_memory(), condition.on_base.applied_to(model) if condition.on_base else nullcontext():
            yield
    else:
        with _corrections_off(adapter_of(model)) if condition.memory == SCALE_ZERO else nullcontext():
            yield


@contextmanager
def _corrections_off(adapter: DeltaMemAdapter) -> Iterator[None]:
    """Set every Δ to zero inside the block."""
    branches, layers = adapter.config.branches, adapter.layer_indices
    deltas: list[Any] = [adapter.layer(layer).delta_of(branch).weight for layer in layers for branch in branches]
    kept = [weight.detach().clone() for weight in deltas]
    try:
        with torch.no_grad():
            for weight in deltas:
                weight.zero_()
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(deltas, kept, strict=True):
                weight.copy_(value)
