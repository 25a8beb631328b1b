"""The conditions of an evaluation: which memory is used, and which part of the history is in the context."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation import MEMORY_ONLY

if TYPE_CHECKING:
    from deltamem_tool.baselines.lora import Lora
    from deltamem_tool.baselines.static import Static

# Memories.
OWN, ZERO, DONOR, MEAN, PERMUTED, SCALE_ZERO = "own", "zero", "donor", "mean", "permuted", "scale_zero"
NEVER_WRITTEN = "never written"  # zeros, even if questions write
MEAN_OF = 100  # maximum number of other histories whose memories are averaged
# What is in view before the question.
NOTHING, WINDOW, ALL, RETRIEVED, TRUNCATED = "nothing", "window", "all", "retrieved", "truncated"
STATE = "state"  # the condition that all others are compared with
PYTORCH, ONNX = "pytorch", "onnx"  # runtimes
NEED_PYTORCH = ("scale_zero", "no_adapter", "static", "lora", "lora_full_context")
PERMUTED_STATE = "permuted_state"
# The adapter with a wrong memory, or with none to speak of.
CONTROLS = ("zero_state", "donor_state", "mean_state", PERMUTED_STATE, "scale_zero")


@dataclass(frozen=True)
class Condition:
    """One condition under which questions are asked.

    Args:
        name: name of the condition.
        memory: the memory that is used; None means the base model without the adapter.
        view: the part of the history that is in the context.
        meaning: description of the condition.
        on_base: LoRA or static adapter on the base model, if the adapter is not used.
    """

    name: str
    memory: str | None
    view: str
    meaning: str
    on_base: Lora | Static | None = None


@dataclass(frozen=True)
class EvalProtocol:
    """What is in the context besides the memory.

    It is nothing, the last messages of the history within `window` tokens, or all of the history.
    """

    name: str
    view: str
    window: int = 0

    @classmethod
    def parse(cls, text: str) -> EvalProtocol:
        """Parse `memory`, `window:N` or `full`.

        Raises:
            ConfigError: the text is none of these.
        """
        match = re.fullmatch(r"window:([1-9]\d{0,8})", text)
        if match:
            return cls(text, WINDOW, int(match[1]))
        views = {MEMORY_ONLY: NOTHING, "full": ALL}
        if text not in views:
            raise ConfigError(f"There is no protocol {text!r}.", "", "Write memory, window:N (tokens) or full.")
        return cls(text, views[text])


def readable_name(name: str) -> str:
    """Return the name of a condition or metric as it appears in prose."""
    return name.replace("_", " ")


def conditions_of(
    protocol: EvalProtocol,
    retrieved: bool = False,
    truncate: int | None = None,
    lora: Lora | None = None,
    static: Static | None = None,
    runtime: str = PYTORCH,
    others: int = MEAN_OF,
    can_permute: bool = True,
) -> list[Condition]:
    """Return the state and its controls, which see the same context, and the base model with that context and with all.

    Args:
        protocol: what is in the context.
        retrieved: also the base model with passages that BM25 finds for the question.
        truncate: also the base model with the last messages within this many tokens.
        lora: also the base model with this LoRA, with the same context and with the full one.
        static: also the base model with this static adapter, with the same context.
        runtime: in ONNX Runtime, the base model is the graph with a memory of zeros that is not written. "No adapter"
            would therefore repeat the zero state. Conditions that change weights are not possible either.
        others: number of other histories whose memories are averaged.
        can_permute: whether the memory has layers that can be permuted.
    """
    view = protocol.view
    seen = {
        NOTHING: "the question",
        WINDOW: f"the last messages within {protocol.window} tokens, and the question",
        ALL: "everything",
    }
    shown, onnx = seen[view], runtime != PYTORCH
    without = NEVER_WRITTEN if onnx else None
    base = "a memory of zeros, which corrects nothing" if onnx else "the base model without adapter"
    conditions = [
        Condition(STATE, OWN, view, f"the memory of the history, and {shown}"),
        Condition("zero_state", ZERO, view, "the same with the memory set to zeros"),
        Condition("donor_state", DONOR, view, "the same with the memory of another history"),
        Condition("mean_state", MEAN, view, f"the same with the mean of the memories of {others} other histories"),
    ]
    if can_permute:
        meaning = "the right memory, in which every layer has the state of another layer"
        conditions.append(Condition(PERMUTED_STATE, PERMUTED, view, meaning))
    if not onnx:
        conditions += [
            Condition("scale_zero", SCALE_ZERO, view, "the right memory, with the corrections scaled to zero"),
            Condition("no_adapter", None, view, f"{base}, and {shown}"),
        ]
    if view != ALL:
        conditions.append(Condition("full_context", without, ALL, f"{base}, the whole history in view"))
    if retrieved:
        budget = f"as many tokens as the window ({protocol.window})" if view == WINDOW else "a few passages"
        conditions.append(Condition("bm25", without, RETRIEVED, f"{base}, {budget} that BM25 finds"))
    if truncate is not None:
        meaning = f"{base}, the last messages within {truncate} tokens in view"
        conditions.append(Condition("truncated", without, TRUNCATED, meaning))
    if static is not None:
        check_pytorch("static", runtime)
        conditions.append(Condition("static", None, view, f"{static.description}, and {shown}", static))
    if lora is not None:
        check_pytorch("lora", runtime)
        base = f"the base model with the LoRA {lora.folder.name}"
        conditions.append(Condition("lora", None, view, f"{base}, and {shown}", lora))
        if view != ALL:
            conditions.append(Condition("lora_full_context", None, ALL, f"{base}, the whole history in view", lora))
    return conditions


def select(conditions: Sequence[Condition], only: Collection[str] | None, runtime: str = PYTORCH) -> list[Condition]:
    """Return the named conditions, or all.

    Raises:
        ConfigError: there is no such condition, or it needs PyTorch, or a memory of several layers; or a baseline
            that was requested is not among the names.
    """
    known = {condition.name for condition in conditions}
    names = set(only or known)
    baselines: dict[object, set[str]] = {}  # conditions that an option adds, by what it is
    for condition in conditions:
        if condition.on_base is not None or condition.view in (RETRIEVED, TRUNCATED):
            key = condition.view if condition.on_base is None else id(condition.on_base)
            baselines.setdefault(key, set()).add(condition.name)
    for added in baselines.values():
        if not added & names:
            baseline = min(added)
            raise ConfigError(
                f"The baseline {baseline} would not be used.",
                f"The chosen conditions are {', '.join(sorted(names))}.",
                f"Add {baseline} to them, or leave out the baseline's option.",
            )
    for name in sorted(names - known):
        if name in NEED_PYTORCH:
            check_pytorch(name, runtime)
        if name == PERMUTED_STATE:
            raise ConfigError(
                f"The condition {name} needs a memory of several layers.",
                "It gives every layer the state of another layer, and this memory has only one.",
                "Leave this condition out.",
            )
        raise ConfigError(
            f"There is no condition {name!r}.", f"The conditions are {', '.join(sorted(known))}.", "Choose from these."
        )
    return [condition for condition in conditions if condition.name in names]


def check_pytorch(condition: str, runtime: str) -> None:
    """Reject a condition that changes weights if the model is an ONNX folder.

    Raises:
        ConfigError: the model is an ONNX folder.
    """
    if runtime != PYTORCH:
        raise ConfigError(
            f"The condition {condition} needs PyTorch.",
            "It changes the model's weights, and those of an ONNX graph are fixed.",
            "Evaluate the adapter that was exported, or leave this condition out.",
        )
