"""Rules that several options of a recipe must satisfy together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deltamem_tool.config import DeltaMemConfig, Rule
from deltamem_tool.data.dialogues import KIND_OF
from deltamem_tool.errors import Problem

# Options that apply only to `data.generated: facts`, with their defaults.
FACT_OPTIONS: dict[str, Any] = {
    "chats_first": 0.0,
    "chats_last": 1.0,
    "chats_from": 0.0,
    "chats_until": 0.5,
    "talk_first": 0.0,
    "talk_last": 1.0,
    "bare_first": 0.0,
    "bare_last": 0.0,
    "third_person": 0.25,
    "system": None,
}

# Options that apply only to conversations of `data.path`, with their defaults.
PATH_OPTIONS: dict[str, Any] = {
    "split": "train",
    "revision": None,
    "eval_path": None,
    "eval_split": None,
    "supervise": "last",
    "recent_turns": 0,
    "skip_bad_rows": False,
    "group_by_length": False,
}

# Rules about combinations of options: their keys, the condition, and the message if it is violated. An error is
# reported at the first of the keys that the recipe gives.
RULES: tuple[Rule, ...] = (
    Rule(
        ("lora", "memory"),
        lambda lora, memory: lora is None or memory == DeltaMemConfig(),
        "a recipe trains a memory or a LoRA: leave out lora or memory",
    ),
    Rule(
        ("lora", "adapter"),
        lambda lora, adapter: lora is None or adapter is None,
        "a recipe trains a memory or a LoRA: leave out lora or adapter",
    ),
    Rule(
        ("static", "lora"),
        lambda static, lora: lora is None or not static,
        "a recipe trains a static adapter or a LoRA: leave out static or lora",
    ),
    *(
        Rule(
            (key, "lora"),
            lambda value, lora: lora is None or value == 0,
            f"{key} applies to a memory, and lora trains none: leave out one of them",
        )
        for key in (
            "objective.write_sparsity",
            "objective.full_context_kl",
            "objective.history_kl",
            "objective.unrelated_kl",
            "objective.addressing",
            "data.recent_turns",
        )
    ),
    Rule(
        ("objective.unrelated_kl", "static"),
        lambda weight, static: weight == 0 or not static,
        "objective.unrelated_kl applies to a memory, and static trains none: leave out one of them",
    ),
    Rule(
        ("objective.unrelated_kl", "data.unrelated"),
        lambda weight, path: (weight == 0) == (path is None),
        "data.unrelated and objective.unrelated_kl need each other: give both, or leave out both",
    ),
    Rule(
        ("objective.addressing", "training.bptt"),
        lambda weight, chunks: weight == 0 or chunks is None,
        "objective.addressing compares the keys of whole histories: leave out training.bptt",
    ),
    Rule(
        ("objective.context_dropout", "data.recent_turns"),
        lambda dropout, turns: dropout == 0 or turns >= 1,
        "objective.context_dropout hides recent turns: data.recent_turns must be 1 or more",
    ),
    Rule(
        ("data.facts_first", "data.facts_last"),
        lambda first, last: first <= last,
        "data.facts_first must not be greater than data.facts_last",
    ),
    Rule(
        ("data.facts_last", "data.unanswerable", "data.generated"),
        lambda last, share, generated: share == 0 or generated == "facts" or last < len(KIND_OF),
        "data.facts_last leaves none for a question about something never told: "
        f"with data.unanswerable it must be {len(KIND_OF) - 1} or less",
    ),
    Rule(
        ("data.chats_from", "data.chats_until"),
        lambda start, end: start <= end,
        "data.chats_from must not be greater than data.chats_until",
    ),
    Rule(
        ("training.steps", "training.epochs"),
        lambda steps, epochs: steps is None or epochs is None,
        "training.steps and training.epochs cannot be combined: leave out one of them",
    ),
    Rule(
        ("training.epochs", "training.steps", "data.path"),
        lambda epochs, steps, path: path is not None or steps is not None,
        "without data.path, dialogues are generated without end: give training.steps or data.path",
    ),
    Rule(
        ("training.bptt", "training.write_chunk"),
        lambda bptt, chunk: bptt is None or chunk is not None,
        "training.bptt counts chunks: give training.write_chunk",
    ),
    *(
        Rule(
            (key, "lora"),
            lambda value, lora: lora is None or value is None,
            f"{key} applies to writing a memory, and lora trains none: leave out one of them",
        )
        for key in ("training.write_chunk", "training.bptt")
    ),
    *(
        Rule(
            (f"data.{name}", "data.path"),
            lambda value, path, usual=usual: path is not None or value == usual,
            f"data.{name} applies to your own conversations: give data.path, or leave out data.{name}",
        )
        for name, usual in PATH_OPTIONS.items()
    ),
    Rule(
        ("data.mix", "data.path"),
        lambda mix, path: mix == 0 or path is not None,
        "data.mix is the share of generated episodes among your own: give data.path, or leave out data.mix",
    ),
    Rule(
        ("data.mix", "data.group_by_length"),
        lambda mix, grouped: mix == 0 or not grouped,
        "data.group_by_length applies only to your own conversations: leave out data.group_by_length or data.mix",
    ),
    Rule(
        ("data.generated", "data.path", "data.mix"),
        lambda generated, path, mix: generated == "dialogues" or path is None or mix > 0,
        "with data.path, nothing is generated: give data.mix, or leave out data.generated",
    ),
    *(
        Rule(
            (f"data.{name}", "data.generated"),
            lambda value, generated, usual=usual: generated == "facts" or value == usual,
            f"data.{name} applies to natural facts: give data.generated: facts, or leave out data.{name}",
        )
        for name, usual in FACT_OPTIONS.items()
    ),
    Rule(
        ("training.eval_every", "data.path", "data.eval_path", "data.eval_split"),
        lambda every, path, other, split: every is None or path is None or other is not None or split is not None,
        "training.eval_every needs conversations that are not trained on: give data.eval_path or data.eval_split",
    ),
    Rule(
        ("training.early_stop", "training.eval_every"),
        lambda stop, every: stop is None or every is not None,
        "training.early_stop counts evaluations: give training.eval_every",
    ),
    *(
        Rule(keys, rule.holds, rule.why.format(*keys))
        for rule in DeltaMemConfig.RULES
        for keys in [tuple(f"memory.{key}" for key in rule.keys)]
    ),
)


def violations(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the violated rules among those whose options are all in `values`, a mapping by dotted key."""
    for keys, holds, why in RULES:
        if all(key in values for key in keys) and not holds(*(values[key] for key in keys)):
            yield Problem(tuple(tuple(key.split(".")) for key in keys), why)
