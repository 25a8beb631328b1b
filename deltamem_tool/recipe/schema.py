"""What a recipe can say. pydantic checks each option by itself; `rules`, what options must keep to together."""

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
from deltamem_tool.errors import ConfigError, Key, Known, shown
from deltamem_tool.io.names import expand_name
from deltamem_tool.recipe.rules import FACT_OPTIONS, broken

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
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
        raise ValueError(f"must be a name that transformers knows, not {value!r}: {hint}")

    return AfterValidator(check)


def _as_pairs(value: Any) -> Any:
    """A mapping of names to plain values as sorted pairs, which compare, hash and cannot change."""
    if isinstance(value, tuple):
        value = dict(value)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError("must have keys inside")
    for name, option in value.items():
        plain = (
            option is None
            or isinstance(option, bool | int | str)
            or (isinstance(option, float) and math.isfinite(option))
        )
        if not plain:
            raise ValueError(f"has {name!r}, which must be a number, text, true, false or null, not {shown(option)}")
    return tuple(sorted(value.items()))


def _expanded(name: str) -> str:
    try:
        return expand_name(name)
    except ConfigError as error:
        raise ValueError(f"is not a path: {error.why}") from error


Text = Annotated[str, Strict(), Field(min_length=1)]
Name = Annotated[Text, AfterValidator(_expanded)]  # of a file, a folder or a repository
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
        return [problem.why for problem in broken(values)]


@dataclass(frozen=True, config=OPTIONS)
class LoraOptions(_Options):
    """A LoRA of PEFT in place of a memory, to compare with."""

    SECTION: ClassVar[Key] = ("lora",)

    rank: Annotated[Count, Field(le=MAX_LORA_RANK)] = 8  # numbers a token between the two matrices of a correction
    alpha: Positive = 16.0  # corrections are scaled by alpha / rank
    dropout: ShareBelowOne = 0.0  # probability that a number on the way in is left out
    targets: Texts = ("q_proj", "o_proj")  # names of the modules that are corrected


@dataclass(frozen=True, config=OPTIONS)
class DataOptions(_Options):
    """Where episodes come from: `path`; or they are generated, as small dialogues or natural facts; or both."""

    SECTION: ClassVar[Key] = ("data",)

    path: Name | None = None  # a JSONL or parquet file of conversations, or a dataset's id on the Hub
    split: Text = "train"  # of a dataset on the Hub
    revision: Text | None = None  # of a dataset on the Hub
    eval_path: Name | None = None  # other conversations than those of `path`, for training.eval_every
    eval_split: Text | None = None  # of eval_path, or else of `path`; train if nothing is said
    supervise: Literal["last", "all"] = "last"  # which of the assistant's turns are answers to learn
    recent_turns: Whole = 0  # turns before the question that the read pass may see too
    skip_bad_rows: StrictBool = False  # leave out rows that are not conversations, and count them
    group_by_length: StrictBool = False  # put histories of similar length into a batch
    max_write_tokens: Count = 8192  # longer histories lose their beginning
    max_read_tokens: Count = 512  # longer exchanges are an error
    facts_first: Facts = 2  # generated: the most facts in an episode at the start of training
    facts_last: Facts = 6  # and once the number has grown
    growth: Share = 0.5  # share of training over which the number of facts grows
    fewest: Share = 0.0  # generated: an episode has at least this share of the most facts there may be
    replies: Share = 0.0  # generated: share of the episodes that also train a reply which needs no memory
    unanswerable: ShareBelowOne = 0.0  # generated: share of the questions about something that was never told
    unrelated: Name | None = None  # conversations that no memory is needed for, for objective.unrelated_kl
    mix: ShareBelowOne = 0.0  # share of generated episodes among those of `path`
    generated: Literal["dialogues", "facts"] = "dialogues"  # the words of the shipped backbone, or any tokenizer's
    chats_first: Share = FACT_OPTIONS["chats_first"]  # facts: share of whole chats at the start of training,
    chats_last: Share = FACT_OPTIONS["chats_last"]  # and once it has grown; the others are as short as can be
    chats_from: Share = FACT_OPTIONS["chats_from"]  # share of training at which the share of chats begins to grow,
    chats_until: Share = FACT_OPTIONS["chats_until"]  # and at which it has grown
    talk_first: Weight = FACT_OPTIONS["talk_first"]  # facts: mean turns of small talk before a statement of a chat,
    talk_last: Weight = FACT_OPTIONS["talk_last"]  # which grow as the share of chats does
    bare_first: Share = FACT_OPTIONS["bare_first"]  # facts: share of values that are any word, whatever they are about,
    bare_last: Share = FACT_OPTIONS["bare_last"]  # which grows as the number of facts does
    third_person: Share = FACT_OPTIONS["third_person"]  # facts: share that is somebody else's than the user's
    system: Prompt | None = FACT_OPTIONS["system"]  # facts: the system prompt of all; by default a chat's own, or none


@dataclass(frozen=True, config=OPTIONS)
class ObjectiveOptions(_Options):
    """What is learned beside the answers."""

    SECTION: ClassVar[Key] = ("objective",)

    write_sparsity: Weight = 0.0  # weight of the squared distance of the mean β of what is written from write_target
    write_target: Share = 0.05  # the mean β that write_sparsity asks for
    context_dropout: Share = 0.0  # probability that the recent turns are hidden from the read pass
    full_context_kl: Weight = 0.0  # weight of the divergence from the base with the whole history in its context
    history_kl: Weight = 0.0  # weight of the divergence from the base of every token of the history, as it is written
    unrelated_kl: Weight = 0.0  # weight of the divergence from the base of the answers in data.unrelated
    addressing: Weight = 0.0  # weight of the contrastive loss by which queries find the keys of what they ask for


@dataclass(frozen=True, config=OPTIONS)
class TrainingOptions(_Options):
    """How long, how fast and on what. `steps` or `epochs`; conversations with neither are gone through once."""

    SECTION: ClassVar[Key] = ("training",)

    steps: Count | None = None  # of the optimizer
    epochs: Positive | None = None  # times that all conversations are gone through
    batch_size: Count = 32  # of one process
    gradient_accumulation: Count = 1  # batches a step
    learning_rate: Positive = 2e-4  # the highest one, after the warmup
    scheduler: Scheduler = "cosine"  # how the learning rate falls
    scheduler_options: Pairs = ()  # of the scheduler, by name
    optimizer: Optimizer = "adamw_torch"  # what makes a step of gradients
    optimizer_options: Text | None = None  # of the optimizer, as the Trainer's optim_args
    warmup: ShareBelowOne = 0.1  # share of the steps in which the learning rate rises
    weight_decay: Weight = 0.0  # what AdamW takes off the weights
    max_grad_norm: Weight = 1.0  # longer gradients are cut to this norm; 0: none are
    seed: Seed = 42  # of fresh weights, generated episodes and order
    save_every: Count | None = None  # steps between checkpoints; by default twenty checkpoints a run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the frozen base; auto: as it is stored
    quantize: Literal["none", "int8", "nf4"] = "none"  # of the frozen base, by bitsandbytes
    shard: Literal["none", "fsdp2"] = "none"  # the frozen base, over the processes of a launcher
    attention: Text | None = None  # attn_implementation of the base
    gradient_checkpointing: StrictBool = False  # run each layer again in the backward pass, which saves memory
    write_chunk: Count | None = None  # tokens of the write pass in one call; by default all
    bptt: Count | None = None  # chunks at the end through which gradients flow; by default all
    eval_every: Count | None = None  # steps between evaluations; by default there are none
    eval_episodes: Count = 64  # episodes of an evaluation
    early_stop: Count | None = None  # evaluations without improvement after which the run ends
    report_to: tuple[Reporter, ...] = ()  # where figures go, as the Trainer's report_to


@dataclass(frozen=True, config=OPTIONS)
class Recipe(_Options):
    """Everything that decides a training run.

    Args:
        base: folder, GGUF file or Hub id of the frozen model; `builtin:backbone` is the one the package ships.
        out: the adapter folder to write.
        revision: of the base on the Hub.
        adapter: an adapter folder to start from; `memory` is then its own. With `static`, a static adapter's.
        trust_remote_code: the base may run Python code of its own.
        memory: the mechanism.
        lora: trained in place of a memory.
        static: train the static adapter that matches the memory, with a constant in place of what is read from a state.

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
