"""A training run, from its recipe to its adapter folder. The base model is frozen."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from deltamem_tool.adapter.attach import attach
from deltamem_tool.adapter.config_file import BaseModel
from deltamem_tool.adapter.find_base import base_of
from deltamem_tool.adapter.load import load
from deltamem_tool.base_model.attention import attention_layers, select_layers
from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.base_model.launch import members, report_lost_processes
from deltamem_tool.base_model.limits import Limits
from deltamem_tool.base_model.tokenizer import read_tokenizer, tokenizer_of
from deltamem_tool.baselines.lora import new_lora
from deltamem_tool.baselines.static import Static, StaticAdapter, new_static
from deltamem_tool.errors import ConfigError, DeltaMemError
from deltamem_tool.io.atomic import check_overwrite, free_name, is_free, path_taken_error, resolve
from deltamem_tool.io.formats import versions
from deltamem_tool.io.names import check_revision
from deltamem_tool.memory.attach import adapter_of, fresh_adapter, hook
from deltamem_tool.recipe.load import Recipe
from deltamem_tool.training.arguments import tensorboard, training_arguments
from deltamem_tool.training.baseline_steps import LoraStepModel, StaticStepModel, Step
from deltamem_tool.training.episodes import RunData, run_data
from deltamem_tool.training.estimate import step_seconds
from deltamem_tool.training.launch import Launch, join_launch
from deltamem_tool.training.loss import EpisodeModel
from deltamem_tool.training.run_folder import (
    check_run_folder,
    checkpoint_to_resume,
    checkpoints,
    open_run_folder,
    remove_if_empty,
    run_folder,
    start_of,
    step_of,
)
from deltamem_tool.training.sharding import BaseShare, base_share, fsdp_config, is_sharded, shard_packed
from deltamem_tool.training.summary import TrainingSummary, named_recipe
from deltamem_tool.training.trainer import (
    EarlyStop,
    EpisodeTrainer,
    Progress,
    Report,
)


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training run."""

    adapter: Path
    steps: int
    losses: list[tuple[int, float]]  # (step, mean cross-entropy of the answers since the one before)
    seconds: float
    parameters: int
    skipped_rows: int = 0
    is_main: bool = True  # of the processes of a run, one speaks


def train(
    recipe: Recipe,
    resume: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
    encoding: Callable[[int, int], None] | None = None,
    expecting: Callable[[int, float], None] | None = None,
    sharded: Callable[[BaseShare], None] | None = None,
) -> TrainingResult:
    """Train an adapter from a recipe and write its folder.

    Training uses one device: the first GPU in CUDA_VISIBLE_DEVICES, or else the CPU. Under `torchrun` or
    `accelerate launch`, each process uses one device, and the processes can share the base model (FSDP2).

    Checkpoints go to the folder `<out>.run` and are removed at the end. Ctrl-C ends the run after the current step, and
    a checkpoint and the adapter so far are written.

    Args:
        recipe: the recipe.
        resume: resume from the last checkpoint.
        overwrite: replace the adapter folder and the checkpoints of another run.
        report: called after each step with the step, the number of steps, and the last loss.
        encoding: called with the number of episodes that are encoded and their total, before the first step.
        expecting: called before the first step with the number of remaining steps and the seconds that they are
            estimated to take, without evaluations. The estimate costs up to two steps.
        sharded: called in the main process with the share of the base model that each process holds.

    Raises:
        DeltaMemError: the recipe cannot be run; the run diverged, was interrupted or lost another process; or another
            program created `out` in the meantime, and the adapter was written beside it.

    Example:
        >>> import deltamem_tool as deltamem
        >>> from deltamem_tool.recipe.load import load_recipe, shipped_recipe
        >>> recipe = load_recipe(shipped_recipe("quickstart.yaml"), ["training.steps=2"], out="my-adapter")
        >>> result = deltamem.train(recipe)
        >>> deltamem.load("my-adapter").config.model_type
        'qwen3'
    """
    launch = join_launch(recipe)
    out, run, state = Path(recipe.out), run_folder(recipe.out), launch.state
    start = start_of(recipe, state.num_processes)
    checkpoint = checkpoint_to_resume(run, start) if resume else None
    check_overwrite(out, overwrite or resume)
    if not resume and checkpoints(run) and not overwrite:
        raise DeltaMemError(
            f"{run} has checkpoints of an unfinished run.",
            "Nothing was changed.",
            "Pass --resume to continue that run, or --overwrite to start again.",
        )
    check_run_folder(run)
    started = time.monotonic()
    set_seed(recipe.training.seed)
    step, model, tokenizer = step_model(recipe, launch)
    share = base_share(model) if launch.shards else None
    if share is not None and sharded is not None and state.is_main_process:
        sharded(share)
    granularity = step.adapter.config.granularity if isinstance(step, EpisodeModel) else "token"
    data = run_data(recipe, tokenizer, granularity, state.num_processes, encoding, Limits.from_config(model.config))
    progress = Progress(report)
    advice = f"The complete checkpoints are in {run}. Pass --resume to continue from the last one."
    with remove_if_empty(run), report_lost_processes(members(), advice):  # the Trainer makes the folder
        trainer = _trainer(recipe, step, data, progress, launch.shards)
        if not _is_placed(model):
            cast(nn.Module, model).to(trainer.args.device)  # transformers hides the signature
        at_end = checkpoint is not None and trainer.is_at_end(checkpoint)
        if expecting is not None and (state.is_main_process or launch.shards) and not at_end:
            options, to_come = recipe.training, data.steps - (0 if checkpoint is None else step_of(checkpoint))
            measured = (step, data.training, data.collator, options.batch_size, trainer.args.device)
            seconds = step_seconds(*measured, together=launch.shards)
            if state.is_main_process:
                expecting(to_come, to_come * options.gradient_accumulation * seconds)
        state.wait_for_everyone()
        with (
            open_run_folder(run, start, resume) if state.is_main_process else nullcontext(),
            progress.stop_on_interrupt(),
        ):
            state.wait_for_everyone()
            if checkpoint is not None and at_end:
                trainer.load_end(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            steps = trainer.state.global_step
            interrupted = progress.interrupted and steps < data.steps
            if not interrupted and state.is_main_process:
                trainer.load_best()
            state.wait_for_everyone()
    summary = _summary(recipe, step, data, trainer, interrupted, time.monotonic() - started, share)
    place = out if overwrite or resume or is_free(resolve(out)) else free_name(out)
    state.wait_for_everyone()
    if state.is_main_process:
        step.save(place, overwrite or resume, summary.files())
        if not interrupted:
            shutil.rmtree(run, ignore_errors=True)
    state.wait_for_everyone()
    if interrupted:
        raise DeltaMemError(
            f"Interrupted after step {steps} of {data.steps}.",
            f"The adapter as trained so far is in {place}, the checkpoint in {run}.",
            "Run the same command with --resume to continue.",
        )
    if place != out:
        raise path_taken_error(out, place)
    return TrainingResult(
        out, steps, summary.losses, summary.seconds, summary.parameters, data.skipped_rows, state.is_main_process
    )


def _trainer(recipe: Recipe, step: Step, data: RunData, progress: Progress, shards: bool) -> EpisodeTrainer:
    options, run = recipe.training, run_folder(recipe.out)
    args = training_arguments(options, data.steps, run)
    stop = [] if options.early_stop is None else [EarlyStop(options.early_stop)]
    return EpisodeTrainer(
        model=step,
        args=args,
        train_dataset=data.training,
        validation=data.validation,
        data_collator=data.collator,
        callbacks=[progress, *stop, *tensorboard(options, Path(f"{Path(recipe.out)}.logs"), args.process_index == 0)],
        order=data.order,
        run=run,
        shards=shards,
    )


def _summary(
    recipe: Recipe,
    step: Step,
    data: RunData,
    trainer: EpisodeTrainer,
    interrupted: bool,
    seconds: float,
    share: BaseShare | None,
) -> TrainingSummary:
    return TrainingSummary(
        recipe=named_recipe(recipe),
        steps=trainer.state.global_step,
        best_step=None if interrupted else trainer.state.best_global_step,
        seconds=seconds,
        processes=trainer.args.world_size,
        device=trainer.args.device.type,
        shard=share,
        parameters=sum(parameter.numel() for parameter in step.parameters()),
        episodes=data.statistics,
        skipped_rows=data.skipped_rows,
        log=trainer.state.log_history,
        versions=versions(),
    )


def step_model(recipe: Recipe, launch: Launch | None = None) -> tuple[Step, PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the step that a recipe trains, its model, and the tokenizer."""
    options = recipe.training
    if recipe.lora is not None or recipe.static:
        check_revision(recipe.base, recipe.revision)
        checkpoint = BaseCheckpoint(recipe.base, recipe.revision, recipe.trust_remote_code)
        tokenizer = read_tokenizer(checkpoint.source)  # first: what is wrong with it is known in a second
        model = _load_model(checkpoint, recipe, launch)
        if recipe.lora is not None:
            lora = new_lora(model, recipe.lora, checkpoint.name, checkpoint.revision)
            return LoraStepModel(lora, options.gradient_checkpointing), lora, tokenizer
        model.train(False)
        made_for = base_of(checkpoint)
        static = _static(recipe, checkpoint, made_for, model)
        step = StaticStepModel(model, static, made_for, recipe.objective, options.gradient_checkpointing)
        return step, model, tokenizer
    model, tokenizer = load_base(recipe, launch)
    chunks = (options.write_chunk, options.bptt, options.gradient_checkpointing)
    return EpisodeModel(model, recipe.objective, *chunks), model, tokenizer


def _static(recipe: Recipe, checkpoint: BaseCheckpoint, base: BaseModel, model: PreTrainedModel) -> StaticAdapter:
    """The static adapter that a recipe starts from: a new one, or that of the folder `adapter`."""
    if recipe.adapter is not None:
        start = Static.read(recipe.adapter)
        start.check_base(base)
        return start.adapter_for(model)
    layers = select_layers(attention_layers(model), recipe.memory)
    return new_static(recipe.memory, layers, checkpoint.first_columns)


def load_base(recipe: Recipe, launch: Launch | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model with a memory that a recipe trains, and its tokenizer."""
    options = _loading_options(recipe, launch)
    if recipe.adapter is not None:
        trust = recipe.trust_remote_code
        model = load(
            recipe.adapter, base=recipe.base, base_revision=recipe.revision, trust_remote_code=trust, **options
        )
        _prepare_packed(model, launch)
        return model, tokenizer_of(model)
    check_revision(recipe.base, recipe.revision)
    checkpoint = BaseCheckpoint(recipe.base, recipe.revision, recipe.trust_remote_code)
    made_for = base_of(checkpoint)
    tokenizer = read_tokenizer(checkpoint.source)
    model = _load_model(checkpoint, recipe, launch)
    model.train(False)
    if options.keys() & {"quantization_config", "distributed_config"}:
        # Where a Δ starts from the base's weights, from those on disk: in memory they are quantised, or in parts.
        layers = select_layers(attention_layers(model), recipe.memory)
        hook(model, fresh_adapter(recipe.memory, layers, checkpoint.first_columns))
    else:
        attach(model, recipe.memory)
    adapter_of(model).made_for = made_for
    return model, tokenizer


def _load_model(checkpoint: BaseCheckpoint, recipe: Recipe, launch: Launch | None) -> PreTrainedModel:
    """Load the base model.

    Raises:
        ConfigError: its weights would be float16, in which small gradients are zeros.
    """
    model = checkpoint.load(**_loading_options(recipe, launch))
    _prepare_packed(model, launch)
    if model.dtype == torch.float16 and not _is_placed(model):
        raise ConfigError(
            f"{checkpoint.name} is stored in float16.",
            "Small gradients become zero in float16.",
            "Set training.dtype to bfloat16 or float32.",
        )
    return model


def _prepare_packed(model: PreTrainedModel, launch: Launch | None) -> None:
    """Have the weights of a quantised `model` stay as they are, or shard them as they are."""
    modules: Iterable[Any] = cast(nn.Module, model).modules()
    for module in modules:
        # On CPUs that have it, a call without gradients would pack weights anew, in a form that gradients do not pass.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if launch is not None and launch.shards and not is_sharded(model):
        shard_packed(model, launch.state.device, launch.offloads)


def _loading_options(recipe: Recipe, launch: Launch | None) -> dict[str, Any]:
    """Return the options of `from_pretrained` for the frozen weights."""
    training = recipe.training
    options: dict[str, Any] = {"dtype": training.dtype}
    if training.attention is not None:
        options["attn_implementation"] = training.attention
    if training.quantize != "none":
        is_int8 = training.quantize == "int8"
        config: Any = BitsAndBytesConfig  # which has no hints
        options["quantization_config"] = config(
            load_in_8bit=is_int8, load_in_4bit=not is_int8, bnb_4bit_quant_type="nf4"
        )
        options["device_map"] = {"": PartialState().device}
    elif launch is not None and launch.shards:
        skeleton = BaseCheckpoint(recipe.base, recipe.revision, recipe.trust_remote_code).skeleton()
        options["distributed_config"] = fsdp_config(skeleton, launch.processes, launch.offloads)
    return options


def _is_placed(model: PreTrainedModel) -> bool:
    """Weights that are quantised or sharded are where they were loaded."""
    return bool(getattr(model, "is_quantized", False)) or is_sharded(model)
