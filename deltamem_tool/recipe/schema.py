"""The options of a recipe. pydantic checks each option by itself; `rules` checks them together."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict, StrictBool
from pydantic.dataclasses import dataclass

from deltamem_tool.config import MAX_NUMBER, OPTIONS, CheckedOptions, DeltaMemConfig
from deltamem_tool.data.dialogues import KIND_OF
from deltamem_tool.errors import ConfigError, Key, Known, short_value
from deltamem_tool.io.names import expand_name
from deltamem_tool.recipe.rules import FACT_OPTIONS, PATH_OPTIONS, violations

MAX_LORA_RANK = 65_536  # the widest models have 16,384 numbers a token

# Values


def _schedulers() -> list[str]:
    from transformers import SchedulerType  # here, since it takes seconds to import

    return [scheduler.value for scheduler in SchedulerType]


def _optimizers() -> list[str]:
    from deltamem_tool._compat import OptimizerNames

    return [optimizer.value for optimizer in OptimizerNames]


def _reporters() -> list[str]:
    from deltamem_tool._compat import INTEGRATION_TO_CALLBACK

    return [*INTEGRATION_TO_CALLBACK]


def _of_transformers(names: Callable[[], list[str]], usual: str | None = None) -> AfterValidator:
    """One of the names that transformers has. It is not imported for the `usual` one."""

    def check(value: str) -> str:
        if value == usual or value in (known := names()):
            return value
        near = [name for name in known if name.startswith(value)] or difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the names are {', '.join(known)}"
        raise ValueError(f"must be a name that transformers knows, not {value!r}: {hint}")

    return AfterValidator(check)


def _as_pairs(value: Any) -> Any:
    """A mapping of names to plain values as sorted pairs, which compare, hash and cannot change."""
    if isinstance(value, tuple):
        value = dict(value)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError("must be a mapping")
    for name, option in value.items():
        plain = (
            option is None
            or isinstance(option, bool | int | str)
            or (isinstance(option, float) and math.isfinite(option))
        )
        if not plain:
            raise ValueError(
                f"has {name!r}, which must be a number, text, true, false or null, not {short_value(option)}"
            )
    return tuple(sorted(value.items()))


def _expand(name: str) -> str:
    try:
        return expand_name(name)
    except ConfigError as error:
        raise ValueError(f"is not a path: {error.why}") from error


Text = Annotated[str, Strict(), Field(min_length=1)]
Name = Annotated[Text, AfterValidator(_expand)]  # of a file, a folder or a repository
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]
Prompt = Annotated[str, Strict()]
Whole = Annotated[int, Strict(), Field(ge=0)]
Count = Annotated[int, Strict(), Field(ge=1)]
Facts = Annotated[int, Strict(), Field(ge=1, le=len(KIND_OF))]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32)]  # what numpy takes
Weight = Annotated[float, Strict(), Field(ge=0, le=MAX_NUMBER)]
Positive = Annotated[float, Strict(), Field(gt=0, le=MAX_NUMBER)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Strict(), Field(ge=0, lt=1)]
Scheduler = Annotated[Text, _of_transformers(_schedulers, usual="cosine")]
Optimizer = Annotated[Text, _of_transformers(_optimizers, usual="adamw_torch")]
Reporter = Annotated[Text, _of_transformers(_reporters)]
Pairs = Annotated[tuple[tuple[str, Any], ...], BeforeValidator(_as_pairs)]

# Options


@dataclass(frozen=True, config=OPTIONS)
class _Options(metaclass=CheckedOptions):
    INVALID: ClassVar[str] = "The recipe is invalid."
    SECTION: ClassVar[Key] = ()

    def _broken_rules(self) -> list[str]:
        values: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            values[".".join((*self.SECTION, entry.name))] = value
            if is_dataclass(value):
                values |= {f"{entry.name}.{inner.name}": getattr(value, inner.name) for inner in fields(value)}
        return [problem.why for problem in violations(values)]


@dataclass(frozen=True, config=OPTIONS)
class LoraOptions(_Options):
    """A LoRA (PEFT) to train in place of a memory, as a baseline."""

    SECTION: ClassVar[Key] = ("lora",)

    rank: Annotated[Count, Field(le=MAX_LORA_RANK)] = 8  # rank of a correction
    alpha: Positive = 16.0  # corrections are scaled by alpha / rank
    dropout: ShareBelowOne = 0.0  # dropout probability of a correction's input
    targets: Texts = ("q_proj", "o_proj")  # names of the modules to correct


@dataclass(frozen=True, config=OPTIONS)
class DataOptions(_Options):
    """Where episodes come from: conversations of `path`, generated dialogues or natural facts, or both."""

    SECTION: ClassVar[Key] = ("data",)

    path: Name | None = None  # JSONL or parquet file of conversations, or id of a dataset on the Hub
    split: Text = PATH_OPTIONS["split"]  # split of a dataset on the Hub
    revision: Text | None = PATH_OPTIONS["revision"]  # revision of a dataset on the Hub
    eval_path: Name | None = PATH_OPTIONS["eval_path"]  # other conversations than `path`, for training.eval_every
    eval_split: Text | None = PATH_OPTIONS["eval_split"]  # split of eval_path, or else of `path`; by default train
    supervise: Literal["last", "all"] = PATH_OPTIONS["supervise"]  # assistant turns to train: the last one, or all
    recent_turns: Whole = PATH_OPTIONS["recent_turns"]  # turns before the question that the read pass sees too
    skip_bad_rows: StrictBool = PATH_OPTIONS["skip_bad_rows"]  # skip rows that are not conversations, and count them
    group_by_length: StrictBool = PATH_OPTIONS["group_by_length"]  # batch histories of similar length
    max_write_tokens: Count = 8192  # longer histories lose their beginning
    max_read_tokens: Count = 512  # longer exchanges are an error
    facts_first: Facts = 2  # generated: largest number of facts in an episode at the start of training
    facts_last: Facts = 6  # generated: the same, once it has grown
    growth: Share = 0.5  # generated: share of training over which the number of facts grows
    fewest: Share = 0.0  # generated: an episode has at least this share of the largest number of facts
    replies: Share = 0.0  # generated: share of episodes that also train a reply which needs no memory
    unanswerable: ShareBelowOne = 0.0  # generated: share of questions about something that was never told
    unrelated: Name | None = None  # conversations that need no memory, for objective.unrelated_kl
    mix: ShareBelowOne = 0.0  # share of generated episodes among those of `path`
    generated: Literal["dialogues", "facts"] = "dialogues"  # dialogues suit the shipped backbone, facts any model
    chats_first: Share = FACT_OPTIONS["chats_first"]  # facts: share of episodes that are chats, at the start
    chats_last: Share = FACT_OPTIONS["chats_last"]  # facts: the same, at the end; the others are plain
    chats_from: Share = FACT_OPTIONS["chats_from"]  # facts: share of training after which it begins to grow
    chats_until: Share = FACT_OPTIONS["chats_until"]  # facts: share of training after which it has grown
    talk_first: Weight = FACT_OPTIONS["talk_first"]  # facts: mean turns of small talk before a statement, at the start
    talk_last: Weight = FACT_OPTIONS["talk_last"]  # facts: the same, at the end; grows with the share of chats
    bare_first: Share = FACT_OPTIONS["bare_first"]  # facts: share of values that are unrelated words, at the start
    bare_last: Share = FACT_OPTIONS["bare_last"]  # facts: the same, at the end; changes with the number of facts
    third_person: Share = FACT_OPTIONS["third_person"]  # facts: share of facts about other people than the user
    system: Prompt | None = FACT_OPTIONS["system"]  # facts: system prompt of all; default: a chat's own, or none


@dataclass(frozen=True, config=OPTIONS)
class ObjectiveOptions(_Options):
    """Additional terms of the loss, beside the cross-entropy of the answers."""

    SECTION: ClassVar[Key] = ("objective",)

    write_sparsity: Weight = 0.0  # weight of the squared distance of the mean β of writes from write_target
    write_target: Share = 0.05  # mean β that write_sparsity aims at
    context_dropout: Share = 0.0  # probability of hiding the recent turns from the read pass
    full_context_kl: Weight = 0.0  # weight of the divergence from the base with the whole history in its context
    history_kl: Weight = 0.0  # weight of the divergence from the base over all tokens of the history, as it is written
    unrelated_kl: Weight = 0.0  # weight of the divergence from the base over the answers in data.unrelated
    addressing: Weight = 0.0  # weight of the contrastive loss by which queries find the keys of what they ask for


@dataclass(frozen=True, config=OPTIONS)
class TrainingOptions(_Options):
    """Duration, optimizer and hardware. With neither `steps` nor `epochs`: one pass over `data.path`."""

    SECTION: ClassVar[Key] = ("training",)

    steps: Count | None = None  # optimizer steps
    epochs: Positive | None = None  # passes over all conversations
    batch_size: Count = 32  # episodes per batch and process
    gradient_accumulation: Count = 1  # batches per step
    learning_rate: Positive = 2e-4  # peak learning rate, after the warmup
    scheduler: Scheduler = "cosine"  # schedule of the learning rate
    scheduler_options: Pairs = ()  # options of the scheduler, by name
    optimizer: Optimizer = "adamw_torch"  # optimizer
    optimizer_options: Text | None = None  # options of the optimizer, as the Trainer's optim_args
    warmup: ShareBelowOne = 0.1  # share of the steps in which the learning rate rises
    weight_decay: Weight = 0.0  # weight decay of AdamW
    max_grad_norm: Weight = 1.0  # longer gradients are clipped to this norm; 0: no clipping
    seed: Seed = 42  # seed of fresh weights, generated episodes and their order
    save_every: Count | None = None  # steps between checkpoints; by default twenty checkpoints per run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # dtype of the frozen base; auto: as stored
    quantize: Literal["none", "int8", "nf4"] = "none"  # quantise the frozen base with bitsandbytes
    shard: Literal["none", "fsdp2"] = "none"  # shard the frozen base over the processes of a launcher
    attention: Text | None = None  # attn_implementation of the base
    gradient_checkpointing: StrictBool = False  # run each layer again in the backward pass, which saves memory
    write_chunk: Count | None = None  # tokens per call of the write pass; by default all
    bptt: Count | None = None  # number of last chunks through which gradients flow; by default all
    eval_every: Count | None = None  # steps between evaluations; by default no evaluation
    eval_episodes: Count = 64  # episodes per evaluation
    early_stop: Count | None = None  # end the run after this many evaluations without improvement
    report_to: tuple[Reporter, ...] = ()  # where to report figures, as the Trainer's report_to


@dataclass(frozen=True, config=OPTIONS)
class Recipe(_Options):
    """Everything that decides a training run.

    Args:
        base: folder, GGUF file or Hub id of the frozen model; `builtin:backbone` is the one in the package.
        out: adapter folder to write.
        revision: revision of the base on the Hub.
        adapter: adapter folder to start from, which then decides `memory`. With `static`, a static adapter.
        trust_remote_code: allow the base to run its own Python code.
        memory: options of the mechanism.
        lora: options of a LoRA to train in place of a memory.
        static: train the static adapter that matches the memory, with a learned constant in place of each reading.

    Raises:
        ConfigError: An option is out of range, or does not go with another one; all of them are named.
    """

    base: Name
    out: Name
    revision: Text | None = None
    adapter: Name | None = None
    trust_remote_code: StrictBool = False
    memory: DeltaMemConfig = DeltaMemConfig()
    lora: LoraOptions | None = None
    static: StrictBool = False
    data: DataOptions = DataOptions()
    objective: ObjectiveOptions = ObjectiveOptions()
    training: TrainingOptions = TrainingOptions()


SECTIONS: dict[str, type] = {
    "memory": DeltaMemConfig,
    "lora": LoraOptions,
    "data": DataOptions,
    "objective": ObjectiveOptions,
    "training": TrainingOptions,
}
KNOWN: Known = {(): [entry.name for entry in fields(Recipe)]} | {
    (name,): [*(entry.name for entry in fields(kind)), *(["preset"] if name == "memory" else [])]
    for name, kind in SECTIONS.items()
}
