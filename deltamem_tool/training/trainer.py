"""transformers' Trainer for episodes: its sampling, logging, evaluation, and checks for errors."""

from __future__ import annotations

import copy
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from deltamem_tool._compat import (
    SAFE_WEIGHTS_NAME,
    TRAIN_SAMPLER,
    TRAINER_STATE_NAME,
    PrinterCallback,
    get_length_grouped_indices,
)
from deltamem_tool.data.store import EncodedEpisodes
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.io.atomic import write_atomically
from deltamem_tool.training.arguments import refused_by_trainer
from deltamem_tool.training.baseline_steps import Step
from deltamem_tool.training.run_folder import BEST_FILE
from deltamem_tool.training.validation import batches_of, metrics, outcomes

ORDERS = ("as they come", "shuffled", "by length")
SHOWN_ROWS = 8  # source rows that an error names
Report = Callable[[int, int, float | None], None]  # step, of how many, cross-entropy of the answers


class EpisodeSampler(Sampler[int]):
    """The order of the episodes. It depends only on seed and epoch, so that a resumed run continues in the same order.

    Args:
        episodes: the dataset, which also needs to know the epoch.
        order: one of ORDERS; generated episodes become harder in the order they come in.
        seed: random seed for shuffling.
        batch_size: number of episodes per step, over all processes. With the order "by length", the episodes of a step
            have similar lengths, so that little is wasted on padding.
    """

    def __init__(self, episodes: Any, order: str, seed: int, batch_size: int = 1) -> None:
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
        self.episodes, self.order, self.seed, self.batch_size, self.epoch = episodes, order, seed, batch_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch, which has its own order."""
        self.epoch = epoch
        if isinstance(self.episodes, EncodedEpisodes):
            self.episodes.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[int]:
        if self.order == "as they come":
            return iter(range(len(self)))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.order == "by length":
            return iter(get_length_grouped_indices(self.episodes.lengths, self.batch_size, generator=generator))
        return iter(torch.randperm(len(self), generator=generator).tolist())


class EpisodeTrainer(Trainer):
    """transformers' Trainer for the steps of `loss`.

    Args:
        order: as in `EpisodeSampler`.
        validation: validation episodes, in the form that the collator takes.
        run: folder of the run.
        shards: whether processes share the base model.
    """

    model: Step
    data_collator: Any  # an EpisodeCollator

    def __init__(
        self, *, order: str, validation: Sequence[Any] = (), run: Path, shards: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs, eval_dataset=cast(Any, validation or None))
        evaluates = self.args.eval_strategy != "no"
        self.validation = batches_of(validation, self.args.per_device_train_batch_size) if evaluates else []
        self.remove_callback(PrinterCallback)
        setattr(self, TRAIN_SAMPLER, self.train_sampler)
        self.order, self.run, self.shards = order, run, shards
        self.sampler: EpisodeSampler | None = None
        self.add_callback(_SetEpoch(self))
        self._parts: list[dict[str, Tensor]] = []  # of the loss, since it was last logged
        self._steps = 0  # since then
        self._conversations: Tensor | int = 0  # in the batches of this step, on all processes

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer, as the Trainer does.

        Raises:
            ConfigError: the recipe has options that the optimizer does not accept.
        """
        with refused_by_trainer("training.optimizer_options"):
            if self.args.optim_args:  # many optimizers ignore them
                without = copy.copy(self.args)
                without.optim_args = None
                chosen, usual = (self.get_optimizer_cls_and_kwargs(each)[1] for each in (self.args, without))
                if chosen == usual:
                    raise ValueError(f"The optimizer takes none of {self.args.optim_args}")
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create the scheduler, as the Trainer does.

        Raises:
            ConfigError: the recipe has options that the scheduler does not accept, or lacks required ones.
        """
        with refused_by_trainer("training.scheduler_options"):
            return super().create_scheduler(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """Fetch the batches of a step, and count their conversations over all processes."""
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        count = torch.tensor(sum(len(batch["write_ids"]) for batch in batches), device=self.args.device)
        self._conversations = self.accelerator.gather(count).sum()
        self._steps += 1
        return batches, tokens

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run the forward and the backward pass of a batch.

        Raises:
            DeltaMemError: the loss is not finite.
        """
        sources = inputs.pop("sources")
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not loss.isfinite():
            raise _divergence_error(self.state.global_step + 1, loss, sources, self._parts[-1].get("gates"))
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a batch with `EpisodeModel.forward`, and record its parts for the log."""
        inputs = {**inputs, "conversations": self._conversations}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._parts.append({name: part for name, part in outputs.items() if name != "loss"})
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the parts of the loss added."""
        if "loss" in logs and self._parts:
            for name in self._parts[0]:
                total = self.accelerator.reduce(torch.stack([part[name].mean() for part in self._parts]).sum())
                # Gates are means over conversations, and the rest are shares of a step's loss.
                of = len(self._parts) * self.args.world_size if name == "gates" else self._steps
                logs[name] = total.item() / of
            self._parts.clear()
            self._steps = 0
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure loss and recall on the validation episodes, with the state, with zeros, and with a donor's state."""
        rank, processes, device = self.args.process_index, self.args.world_size, self.args.device

        def tensors(batch: Sequence[Any]) -> dict[str, Tensor]:
            return {name: part.to(device) for name, part in self.data_collator(batch).items() if name != "sources"}

        total = outcomes(self.model, map(tensors, self.validation[rank::processes]))
        left = len(self.validation) % processes
        if self.shards and 0 < left <= rank:  # the others cannot compute their last batch without this process
            outcomes(self.model, [tensors(self.validation[0])])
        if self.args.world_size > 1:  # a process that has had no batch adds zeros
            total = {name: self.accelerator.reduce(sums.to(device)) for name, sums in total.items()}
        figures = metrics(total)
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        self._keep_if_best(figures[str(self.args.metric_for_best_model)])
        return figures

    def _keep_if_best(self, loss: float) -> None:
        """Write the weights, if the Trainer is about to note this evaluation as the best one so far."""
        best = math.inf if self.state.best_metric is None else self.state.best_metric
        if loss < best and self.args.should_save:
            weights = {name: weight.cpu().contiguous() for name, weight in self.model.state_dict().items()}
            write_atomically(self.run / BEST_FILE, save(weights))

    def load_best(self) -> None:
        """Load the weights of the best evaluation, if there was one.

        Raises:
            DeltaMemError: the file of these weights is missing.
        """
        if self.state.best_global_step is None:  # no evaluation, or none with a finite loss
            return
        file = self.run / BEST_FILE
        if not file.is_file():
            raise DeltaMemError(
                f"{file} is missing.",
                f"It held the weights of step {self.state.best_global_step}, the best evaluation.",
                "Start the run again with --overwrite.",
            )
        self.model.load_state_dict(load_file(file))

    def is_at_end(self, checkpoint: Path) -> bool:
        """Return whether the run was complete at `checkpoint`; the Trainer would run one step too many."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        stops = [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStop)]
        has_waited = any(
            EarlyStop.evaluations_without_improvement(state) >= stop.early_stopping_patience for stop in stops
        )
        return state.global_step >= self.args.max_steps or has_waited

    def load_end(self, checkpoint: Path) -> None:
        """Restore the final state of the run from `checkpoint`, without running a step."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.model.load_state_dict(load_file(checkpoint / SAFE_WEIGHTS_NAME))

    def train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        """Make the sampler for the training set."""
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.sampler = EpisodeSampler(dataset, self.order, self.args.seed, batch)
        return self.sampler


def _divergence_error(step: int, loss: Tensor, sources: Sequence[str], gates: Tensor | None) -> DeltaMemError:
    rows = [source for source in sources if source]
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    means = "" if gates is None else ", ".join(f"{gate:.3g}" for gate in gates.tolist())
    opened = f"; the mean gate β by layer was {means}" if means else ""
    return DeltaMemError(
        f"Training diverged: the loss of step {step} is {loss.item()}.",
        f"The batch was {', '.join(rows[:SHOWN_ROWS])}{more}{opened}. No adapter was written.",
        "Check these rows, then start again with a lower training.learning_rate.",
    )


class Progress(TrainerCallback):
    """Reports the progress of a run. On Ctrl-C it ends the run after the current step, with a checkpoint."""

    def __init__(self, report: Report | None) -> None:
        self.report, self.interrupted = report, False
        self._loss: float | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the step, and stop if requested."""
        if args.eval_strategy != "no" and state.global_step >= state.max_steps:
            control.should_evaluate = True  # else the last weights would never be the best
        if control.should_evaluate:  # which may end the run, perhaps before the first log
            control.should_log = True
        if _is_interrupted_anywhere(self.interrupted, args):
            self.interrupted = control.should_save = control.should_training_stop = True
        if self.report is not None and state.is_world_process_zero:
            self.report(state.global_step, state.max_steps, self._loss)

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep the cross-entropy of the answers for the next report."""
        self._loss = (logs or {}).get("answer", self._loss)

    @contextmanager
    def stop_on_interrupt(self) -> Iterator[None]:
        """End training after the current step on the first Ctrl-C, SIGTERM or SIGHUP, and immediately on the second."""
        if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
            yield
            return
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, *numbers)}
        # What is ignored, as SIGHUP under nohup, stays so, and what other languages handle is theirs (None).
        stopping = [number for number in numbers if before[number] not in (signal.SIG_IGN, None)]

        def stop(*_: Any) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in stopping:
                signal.signal(number, before[number])

        for number in (signal.SIGINT, *stopping):
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, *stopping):
                signal.signal(number, before[number])


def _is_interrupted_anywhere(interrupted: bool, args: TrainingArguments) -> bool:
    """Return whether any process was interrupted, because all of them have to stop at the same step."""
    if args.world_size == 1:
        return interrupted
    flag = torch.tensor(int(interrupted), device=args.device)
    torch.distributed.all_reduce(flag)
    return bool(flag)


class EarlyStop(EarlyStoppingCallback):
    """transformers' early stopping, which continues its count when a run is resumed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the count from the state of the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]  # it has no hints
        self.early_stopping_patience_counter = self.evaluations_without_improvement(state)

    @classmethod
    def evaluations_without_improvement(cls, state: TrainerState) -> int:
        """Read the number of evaluations without improvement from the state of a checkpoint."""
        callbacks = cast(dict[str, Any], state.stateful_callbacks or {})
        return int(callbacks.get(cls.__name__, {}).get("attributes", {}).get("early_stopping_patience_counter", 0))


class _SetEpoch(TrainerCallback):
    """Where several processes resume, accelerate's wrappers hide the sampler from the Trainer."""

    def __init__(self, trainer: EpisodeTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))


def steps_of(epochs: float, episodes: int, batch: int) -> int:
    """Return the number of optimizer steps in `epochs` over `episodes`. The last batch of an epoch may be smaller."""
    return max(1, math.ceil(epochs * math.ceil(episodes / batch)))
