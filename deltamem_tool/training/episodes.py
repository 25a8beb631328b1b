"""The training and validation episodes of a run: the user's conversations, generated ones, or both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from deltamem_tool.base_model.limits import NO_LIMITS, Limits
from deltamem_tool.data.collate import EpisodeCollator
from deltamem_tool.data.encode import Encoder
from deltamem_tool.data.mixed_episodes import MixedEpisodes
from deltamem_tool.data.sources import read_episodes, read_exchanges
from deltamem_tool.data.store import EncodedEpisodes, encode_cached
from deltamem_tool.data.unrelated_exchanges import UnrelatedExchanges
from deltamem_tool.recipe.load import Recipe
from deltamem_tool.training.generated_episodes import generated_episodes, held_out_episodes
from deltamem_tool.training.trainer import steps_of


@dataclass(frozen=True)
class RunData:
    """The training and validation data of a run."""

    training: Any  # a Dataset
    validation: Sequence[Any]
    collator: EpisodeCollator
    order: str  # as `EpisodeSampler` takes it
    batch: int  # episodes of a step, on all processes
    steps: int
    skipped_rows: int = 0

    @property
    def statistics(self) -> dict[str, Any] | None:
        """Sizes of the data; None if all of it is generated."""
        own = self.training.conversations if isinstance(self.training, MixedEpisodes) else self.training
        return asdict(own.statistics()) if isinstance(own, EncodedEpisodes) else None


def run_data(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    granularity: str,
    processes: int,
    report: Callable[[int, int], None] | None = None,
    limits: Limits = NO_LIMITS,
) -> RunData:
    """Read, check and encode the episodes of a recipe for a model with these `limits`. `report` gets the progress.

    Raises:
        DataError: a row is not a conversation, or cannot be encoded.
    """
    data, training = recipe.data, recipe.training
    encoder = Encoder(
        tokenizer,
        data.max_write_tokens,
        data.max_read_tokens,
        granularity,
        recent_turns=data.recent_turns,
        full_context=recipe.objective.full_context_kl > 0 or recipe.lora is not None,
        limits=limits,
    )
    unrelated = None
    if data.unrelated is not None:
        unrelated = UnrelatedExchanges(encoder.exchanges(read_exchanges(data.unrelated)), training.seed)
    collator = EpisodeCollator(encoder, unrelated)
    episodes_per_step = training.batch_size * processes
    batch = episodes_per_step * training.gradient_accumulation
    if data.path is None:
        assert training.steps is not None  # a recipe without a path has them
        generated = generated_episodes(recipe, training.steps * batch, episodes_per_step, encoder)
        count = training.eval_episodes if training.eval_every is not None else 0
        held_out = held_out_episodes(recipe, count, encoder)
        return RunData(generated, held_out, collator, "as they come", batch, training.steps)

    def encode(path: str, split: str, revision: str | None, dropout: float) -> tuple[EncodedEpisodes, int]:
        """Episodes, and how many rows were left out."""
        rows = read_episodes(path, split, revision, data.supervise, data.skip_bad_rows)
        episodes = encode_cached(rows.episodes, encoder, data.skip_bad_rows, report, dropout, training.seed)
        return episodes, len(rows.skipped) + len(episodes.skipped)

    episodes, skipped = encode(data.path, data.split, data.revision, recipe.objective.context_dropout)
    validation: Sequence[Any] = ()
    if training.eval_every is not None:
        path, revision = (data.path, data.revision) if data.eval_path is None else (data.eval_path, None)
        others, more = encode(path, data.eval_split or "train", revision, 1.0)  # from the memory alone
        validation = [others[i] for i in range(min(len(others), training.eval_episodes))]
        skipped += more
    steps = training.steps or steps_of(training.epochs or 1.0, math.ceil(len(episodes) / (1 - data.mix)), batch)
    if data.mix:
        generated = generated_episodes(recipe, steps * batch, episodes_per_step, encoder)
        mixed = MixedEpisodes(episodes, generated, encoder, data.mix, training.seed)
        return RunData(mixed, validation, collator, "as they come", batch, steps, skipped)
    order = "by length" if data.group_by_length else "shuffled"
    return RunData(episodes, validation, collator, order, batch, steps, skipped)
