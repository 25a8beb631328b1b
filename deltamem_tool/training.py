"""Train an adapter on episodes. The base model is frozen; transformers' Trainer drives."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from deltamem_tool.adapter import base_of, load, read_tokenizer, save_adapter, tokenizer_of
from deltamem_tool.checkpoint import BaseCheckpoint
from deltamem_tool.data import IGNORED, ChatEpisodes, DialogueEpisodes, EpisodeCollator
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.files import refuse_existing, write_whole
from deltamem_tool.recipe import Recipe, TrainingOptions
from deltamem_tool.state import MemoryCache
from deltamem_tool.surgery import adapter_of, attach

RECIPE_FILE = "recipe.json"  # in the folder of a run: what it was started with
Report = Callable[[int, int, float | None], None]  # step, of how many, loss


@dataclass(frozen=True)
class TrainingResult:
    adapter: Path
    steps: int
    losses: list[tuple[int, float]]  # (step, mean loss since the one before)
    seconds: float
    parameters: int


class EpisodeModel(nn.Module):
    """One training step as a module. Only the adapter is registered: what the Trainer trains, moves and saves."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.adapter = adapter_of(base)
        self._base = (base,)  # in a tuple, so that it is no submodule

    def forward(
        self,
        write_ids: Tensor,
        write_mask: Tensor,
        read_ids: Tensor,
        read_mask: Tensor,
        labels: Tensor,
        rows: Tensor,
        write_segments: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Write the histories, then score the answers from the memory alone; shapes as `EpisodeCollator` gives them.

        The write pass keeps its graph: gradients flow through the states. The read pass has a fresh KV cache, starts at
        position 0 and does not write.
        """
        (base,) = self._base
        cache = MemoryCache(base)
        cache.segments = write_segments
        base.base_model(input_ids=write_ids, attention_mask=write_mask, past_key_values=cache, use_cache=True)
        assert cache.memory is not None  # the call has made one
        memory = cache.memory.select(rows)
        cache = MemoryCache(base, memory=memory, write=False)
        hidden = base.base_model(
            input_ids=read_ids, attention_mask=read_mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        # Logits only where the next token is scored: [tokens, V] instead of [Q, T, V].
        scored = labels[:, 1:] != IGNORED
        logits = base.get_output_embeddings()(hidden[:, :-1][scored])
        return {"loss": F.cross_entropy(logits.float(), labels[:, 1:][scored])}


def train(
    recipe: Recipe, resume: bool = False, overwrite: bool = False, report: Report | None = None
) -> TrainingResult:
    """Run a recipe and write its adapter folder.

    It runs on one device: the first GPU that CUDA_VISIBLE_DEVICES shows, or else the CPU.
    Checkpoints go to the folder `<out>.run` and are removed at the end. Ctrl-C ends the run after the step it is in,
    with a checkpoint and the adapter so far written.

    Raises:
        DeltaMemError: the recipe cannot be run, or the run diverged or was interrupted.
    """
    out = Path(recipe.out)
    run = Path(f"{out}.run")
    checkpoint = _checkpoint_to_resume(run, recipe) if resume else None
    refuse_existing(out, overwrite or resume)
    if not resume and _checkpoints(run) and not overwrite:
        raise DeltaMemError(
            f"{run} holds the checkpoints of a run that did not end.",
            "Nothing was changed.",
            "Pass --resume to go on with it, or --overwrite to start anew.",
        )
    if not resume and run.is_dir():
        shutil.rmtree(run)
    started = time.monotonic()
    options = recipe.training
    set_seed(options.seed)
    model, tokenizer = _load_base(recipe)
    granularity = adapter_of(model).config.granularity
    collator = EpisodeCollator(tokenizer, recipe.data.max_write_tokens, recipe.data.max_read_tokens, granularity)
    episodes = _episodes(recipe)
    if isinstance(episodes, ChatEpisodes):
        collator.check(episodes.episodes)
    callback = _Progress(report)
    trainer = _EpisodeTrainer(
        model=EpisodeModel(model),
        args=_arguments(options, run),
        train_dataset=episodes,
        data_collator=collator,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    cast(nn.Module, model).to(trainer.args.device)  # transformers hides the signature
    with _run_folder(run, recipe), callback.stopping_on_interrupt():
        trainer.train(resume_from_checkpoint=checkpoint)
    save_adapter(model, out, overwrite=overwrite or resume)
    steps = trainer.state.global_step
    if callback.interrupted and steps < options.steps:
        raise DeltaMemError(
            f"Interrupted after step {steps} of {options.steps}.",
            f"The adapter so far is in {out}, the checkpoint in {run}.",
            "Run the same command with --resume to go on.",
        )
    shutil.rmtree(run, ignore_errors=True)
    losses = [(int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return TrainingResult(out, steps, losses, time.monotonic() - started, adapter_of(model).num_parameters())


def _arguments(options: TrainingOptions, run: Path) -> TrainingArguments:
    """The recipe's options in the Trainer's words; checkpoints go to `run`."""
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.scheduler,
        warmup_steps=int(options.warmup * options.steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        save_steps=options.save_every,
        save_total_limit=2,
        logging_steps=max(1, options.steps // 100),
        logging_nan_inf_filter=False,  # it would report a diverged run as a good one
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = (
            1  # the first GPU alone: DataParallel would copy the adapter, but not the base with its hooks
        )
    return arguments


def _load_base(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if recipe.adapter is not None:
        model = load(recipe.adapter, base=recipe.base, base_revision=recipe.revision)
        return model, tokenizer_of(model)
    checkpoint = BaseCheckpoint(recipe.base, recipe.revision)
    model = checkpoint.load().eval()
    attach(model, recipe.memory).made_for = base_of(checkpoint)
    return model, read_tokenizer(checkpoint.folder)


@contextmanager
def _run_folder(run: Path, recipe: Recipe) -> Iterator[None]:
    """The folder of checkpoints while the run goes on. Whatever ends it, what is left in the folder can be resumed."""
    run.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(run / RECIPE_FILE, json.dumps(_comparable(recipe)).encode())
        yield
    finally:
        whole = _checkpoints(run)
        for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if folder not in whole:  # a full disk
                shutil.rmtree(folder, ignore_errors=True)
        if not whole:
            shutil.rmtree(run, ignore_errors=True)


def _checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. The Trainer writes its state last."""
    found = []
    for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            found.append((json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"], folder))
        except (OSError, ValueError, KeyError):
            continue
    return [folder for _, folder in sorted(found)]


def _checkpoint_to_resume(run: Path, recipe: Recipe) -> str:
    """The last checkpoint of a run of the same recipe.

    Raises:
        DeltaMemError: there is none, or the recipe was another one.
    """
    whole = _checkpoints(run)
    if not whole or not (run / RECIPE_FILE).is_file():
        raise DeltaMemError(
            f"There is nothing to resume in {run}.", "It holds no checkpoint.", "Start without --resume."
        )
    before, now = json.loads((run / RECIPE_FILE).read_text()), _comparable(recipe)
    changed = [f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        raise DeltaMemError(
            f"The run in {run} was started with another recipe.",
            "; ".join(changed) + ".",
            "Resume with the same recipe and --set, or start anew with another --out.",
        )
    return str(whole[-1])


def _comparable(recipe: Recipe) -> dict[str, object]:
    """The recipe's options by dotted key, as JSON gives them back; without `out`, which names the run."""
    flat: dict[str, object] = {}
    for name, value in json.loads(json.dumps(asdict(recipe))).items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    del flat["out"]
    return flat


def _episodes(recipe: Recipe) -> Dataset:
    data, training = recipe.data, recipe.training
    if data.path is not None:
        return ChatEpisodes(data.path)
    count = training.steps * training.batch_size * training.gradient_accumulation
    facts = (data.facts_first, data.facts_last, data.growth)
    return DialogueEpisodes(count, training.batch_size, training.seed, *facts, data.fewest, data.replies)


class _EpisodeTrainer(Trainer):
    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise DeltaMemError(
                f"Training diverged: the loss of step {self.state.global_step + 1} is {loss.item()}.",
                "No adapter was written.",
                "Start anew with a lower training.learning_rate.",
            )
        return loss

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        """Generated episodes grow harder in order; conversations from a file are shuffled."""
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if isinstance(dataset, DialogueEpisodes):
            return SequentialSampler(dataset)
        assert isinstance(dataset, ChatEpisodes)
        return RandomSampler(dataset)


class _Progress(TrainerCallback):
    def __init__(self, report: Report | None) -> None:
        self.report, self.interrupted = report, False
        self._loss: float | None = None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        if self.report is not None:
            self.report(state.global_step, state.max_steps, self._loss)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self._loss = (logs or {}).get("loss", self._loss)

    @contextmanager
    def stopping_on_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C ends training after the current step; a second one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
            yield
            return

        def stop(*_) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
