"""Translate the options of a recipe to the arguments of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, integrations

from deltamem_tool._compat import use_one_gpu
from deltamem_tool.base_model.launch import runs_on_cpus
from deltamem_tool.errors import ConfigError, DeltaMemError, first_line
from deltamem_tool.recipe.load import TrainingOptions

LOGGED = 100  # times that a run says where it is
CHECKPOINTS = 20  # that a run writes, where its recipe does not say


def training_arguments(options: TrainingOptions, steps: int, run: Path) -> TrainingArguments:
    """Return the Trainer's arguments for a recipe. Checkpoints go to `run`; `tensorboard` handles TensorBoard.

    Raises:
        ConfigError: options contradict each other; the message is that of transformers.
    """
    with refused_by_trainer("training"):
        arguments = _arguments(options, steps, run)
    use_one_gpu(arguments)
    return arguments


@contextmanager
def refused_by_trainer(key: str) -> Iterator[None]:
    """Attribute errors inside the block to `key` of the recipe."""
    try:
        yield
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DeltaMemError):
            raise
        raise ConfigError(
            f"The recipe's options under {key} are invalid.", f"{first_line(error)}.", "Correct them and try again."
        ) from error


def _arguments(options: TrainingOptions, steps: int, run: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(run),
        use_cpu=runs_on_cpus(),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.scheduler,
        lr_scheduler_kwargs=dict(options.scheduler_options),
        optim=options.optimizer,
        optim_args=options.optimizer_options,
        warmup_steps=int(options.warmup * steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        save_steps=options.save_every or max(1, steps // CHECKPOINTS),
        save_total_limit=2,
        eval_strategy="no" if options.eval_every is None else "steps",
        eval_steps=options.eval_every,
        metric_for_best_model=None if options.eval_every is None else "eval_loss",
        greater_is_better=None if options.eval_every is None else False,
        logging_steps=max(1, steps // LOGGED),
        logging_nan_inf_filter=False,  # it would report a diverged run as a good one
        disable_tqdm=True,
        report_to=[name for name in options.report_to if name != "tensorboard"] or "none",
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
    )


def tensorboard(options: TrainingOptions, logs: Path, is_main: bool) -> list[TrainerCallback]:
    """Return the callback that writes TensorBoard files to `logs`. The default, the run folder, is removed at the end.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    if "tensorboard" not in options.report_to or not is_main:
        return []
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("TensorBoard is not installed.", f"{error}.", "pip install 'deltamem-tool[train]'") from error
    callback: Any = integrations.TensorBoardCallback  # type: ignore[attr-defined]  # public, and not in its __all__
    return [callback(SummaryWriter(logs))]
