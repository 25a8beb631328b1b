"""What a training run would do: how long, on how much, in how much memory. Nothing is trained, loaded or written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool._compat import Conv1D
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.base_model.attention import attention_layers, select_layers
from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.base_model.tokenizer import read_tokenizer
from deltamem_tool.baselines.lora import new_lora
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.data.encode import IGNORED, EncodedEpisode, EncodedExchange, Encoder
from deltamem_tool.data.episode import Episode
from deltamem_tool.data.sources import read_episodes
from deltamem_tool.data.store import EpisodeStatistics, TokenCounts
from deltamem_tool.errors import DataError, DeltaMemError, first_line
from deltamem_tool.memory.attach import fresh_adapter
from deltamem_tool.recipe.load import Recipe
from deltamem_tool.training.peak_bytes import Report, StepShape, activation_bytes, base_dtype, no_columns
from deltamem_tool.training.run import dialogues_of, encoder_of
from deltamem_tool.training.trainer import steps_of

SAMPLED = 64  # generated dialogues that are looked at, from the whole run
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
ADAMW = 8  # bytes of optimizer state a trained parameter: two float32 moments
# Bytes of a weight that bitsandbytes has quantised: int8 has a float32 a row beside, nf4 one a 64 weights.
_QUANTISED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one process at the fullest moment of a step; an estimate, without what CUDA takes for itself, what
    fragmentation wastes, and padding. Activations, and so the total, are None where they could not be computed."""

    weights: int  # of the frozen base
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None
    total: int | None


@dataclass(frozen=True)
class DryRun:
    trained_parameters: int
    base_parameters: int
    share: float  # of the trained parameters in the base's
    memory_bytes: int  # of one conversation's state
    episodes: EpisodeStatistics | None  # of the data, or of a sample of generated dialogues; None without a tokenizer
    is_sample: bool
    skipped_rows: int  # of the data, and episodes that cannot be encoded
    processes: int
    steps: int | None
    epochs: float | None  # None too where dialogues are generated
    tokens_per_step: float | None  # mean tokens through the model without padding, on all processes
    peak: PeakMemory
    notes: list[str]  # what could not be said, or how it was counted
    is_main: bool = True  # of the processes of a launch, one speaks


def dry_run(recipe: Recipe, report: Report | None = None) -> DryRun:
    """What `train(recipe)` would do. The base's weights are not needed: its config is enough for parameters and memory,
    and its tokenizer for the rest. Nothing is written.

    Args:
        report: told of the fake steps that memory is computed with.

    Raises:
        DeltaMemError: the recipe cannot be run.
    """
    checkpoint = BaseCheckpoint(recipe.base, recipe.revision, recipe.trust_remote_code)
    notes: list[str] = []
    processes, training = int(os.environ.get("WORLD_SIZE", "1")), recipe.training
    folder = None if recipe.adapter is None else read_adapter(recipe.adapter)
    memory = recipe.memory if folder is None else folder.config
    skeleton = checkpoint.skeleton()
    base_parameters, base_bytes, largest = _base(skeleton, recipe, checkpoint.config, notes)
    if recipe.lora is not None:
        lora: nn.Module = new_lora(skeleton, recipe.lora)
        trained = sum(weight.numel() for weight in lora.parameters() if weight.requires_grad)
        memory_bytes, granularity = 0, "token"
    else:
        with torch.device("meta"):
            adapter = fresh_adapter(memory, select_layers(attention_layers(skeleton), memory), no_columns)
        if folder is not None:
            folder.refuse(folder.differences({name: tensor.shape for name, tensor in adapter.state_dict().items()}))
        trained, granularity = adapter.num_parameters(), memory.granularity
        memory_bytes = sum(_state_bytes(shape) for shape in adapter.memory_shape.layers.values())
        memory_bytes += len(adapter.layer_indices) * adapter.memory_shape.segment_width * torch.float32.itemsize
        if len(adapter.layer_indices) < len(attention_layers(skeleton)):
            notes.append("Activations are counted as if every layer had a memory.")
    lengths = _lengths(recipe, checkpoint, granularity, processes, notes)
    steps, epochs, tokens = _course(recipe, lengths, processes)
    if not training.optimizer.startswith("adamw_torch"):
        notes.append(f"The optimizer {training.optimizer} is counted as AdamW.")
    if training.attention not in (None, "eager", "sdpa"):
        notes.append(f"The attention {training.attention} is counted as sdpa.")
    activations = _activations(recipe, checkpoint, memory, lengths, largest, notes, report)
    sizes = (base_bytes, 4 * trained, 4 * trained, ADAMW * trained)
    return DryRun(
        trained_parameters=trained,
        base_parameters=base_parameters,
        share=trained / base_parameters,
        memory_bytes=memory_bytes,
        episodes=None if lengths is None else lengths.statistics(),
        is_sample=recipe.data.path is None,
        skipped_rows=0 if lengths is None else lengths.skipped,
        processes=processes,
        steps=steps,
        epochs=epochs,
        tokens_per_step=tokens,
        peak=PeakMemory(*sizes, activations, None if activations is None else sum(sizes) + activations),
        notes=notes,
        is_main=os.environ.get("RANK", "0") == "0",
    )


def _state_bytes(shape: Iterable[int]) -> int:
    return torch.empty(*shape, dtype=torch.float32, device="meta").nbytes


def _base(
    skeleton: PreTrainedModel, recipe: Recipe, config: PretrainedConfig, notes: list[str]
) -> tuple[int, int, int]:
    """Parameters of the base, bytes of its weights, and bytes of the largest that is unpacked while it is used."""
    width = base_dtype(recipe, config).itemsize
    count = sum(weight.numel() for weight in skeleton.parameters())
    if getattr(config, "quantization_config", None):
        notes.append("The base is stored quantised: its weights are counted as if they were not.")
    bytes_each = _QUANTISED.get(recipe.training.quantize)
    if bytes_each is None:
        return count, count * width, 0
    head = skeleton.get_output_embeddings()
    packed = [m.weight.numel() for m in skeleton.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    return count, round((count - sum(packed)) * width + sum(packed) * bytes_each), max(packed, default=0) * width


@dataclass
class _Lengths:
    """Token counts of encoded episodes, one entry an episode; of its exchanges in a tuple."""

    written: list[int]
    read: list[tuple[int, ...]]  # with nothing but the memory
    seen: list[float]  # all tokens of the exchanges as training reads them
    longest: list[int]  # of the exchanges in any view that the read pass may get
    full: list[tuple[int, ...]]
    scored: list[int]
    cut: int = 0
    skipped: int = 0

    def add(self, episode: EncodedEpisode, dropout: float) -> None:
        self.written.append(len(episode.write_ids))
        self.read.append(_sizes(episode.exchanges))
        recent = _sizes(episode.recent)
        shown = (1 - dropout) * sum(recent) + dropout * sum(self.read[-1]) if recent else sum(self.read[-1])
        self.seen.append(shown)
        self.longest.append(max([*self.read[-1], *recent]))
        self.full.append(_sizes(episode.full))
        self.scored.append(sum(label != IGNORED for each in episode.exchanges for label in each.labels))
        self.cut += episode.cut > 0

    def statistics(self) -> EpisodeStatistics:
        read = [length for lengths in self.read for length in lengths]
        return EpisodeStatistics(
            len(self.written), len(read), _counts(self.written), _counts(read), sum(self.scored), self.cut
        )


def _sizes(exchanges: Iterable[EncodedExchange]) -> tuple[int, ...]:
    return tuple(len(each.ids) for each in exchanges)


def _counts(lengths: list[int]) -> TokenCounts:
    return TokenCounts(sum(lengths) / len(lengths), max(lengths), sum(lengths))


def _lengths(
    recipe: Recipe, checkpoint: BaseCheckpoint, granularity: str, processes: int, notes: list[str]
) -> _Lengths | None:
    """Of the recipe's episodes, or of a sample of generated ones; None, and a note, where there is no tokenizer."""
    tokenizer = _tokenizer(checkpoint)
    if tokenizer is None:
        notes.append(f"No data: {recipe.base} has no tokenizer. Memory is that of the longest episodes allowed.")
        return None
    encoder = encoder_of(recipe, tokenizer, granularity)
    lengths = _Lengths([], [], [], [], [], [])
    data = recipe.data
    if data.path is None:
        every = dialogues_of(recipe, processes)
        count = min(SAMPLED, len(every))
        episodes = [every[i * len(every) // count] for i in range(count)]
    else:
        loaded = read_episodes(data.path, data.split, data.revision, data.supervise, data.skip_bad_rows)
        episodes, lengths.skipped = loaded.episodes, len(loaded.skipped)
    dropout = recipe.objective.context_dropout
    for episode in _encoded(episodes, encoder, data.skip_bad_rows):
        if isinstance(episode, DataError):
            lengths.skipped += 1
        else:
            lengths.add(episode, dropout)
    if not lengths.written:
        raise DataError("No episode can be encoded.", "", "Correct the data, or use another tokenizer.")
    return lengths


def _encoded(episodes: list[Episode], encoder: Encoder, skip_bad: bool) -> Iterator[EncodedEpisode | DataError]:
    """Not through the cache, which would be written to."""
    for each in encoder.attempt(episodes):
        if isinstance(each, DataError) and not skip_bad:
            raise each
        yield each


def _tokenizer(checkpoint: BaseCheckpoint) -> PreTrainedTokenizerBase | None:
    """None where there is not one file of it: transformers would make an empty one from the config.

    Raises:
        ArchitectureError: it cannot be used.
    """
    folder = checkpoint.small_files
    return read_tokenizer(folder) if any((folder / name).is_file() for name in _TOKENIZER_FILES) else None


def _course(recipe: Recipe, lengths: _Lengths | None, processes: int) -> tuple[int | None, float | None, float | None]:
    """Optimizer steps, epochs, and mean tokens of a step."""
    training = recipe.training
    if lengths is None:
        return training.steps, None if training.steps else training.epochs or 1.0, None
    batch = training.batch_size * training.gradient_accumulation * processes
    full = [sum(each) for each in lengths.full]
    through = full if recipe.lora is not None else [w + s for w, s in zip(lengths.written, lengths.seen, strict=True)]
    count = len(through)
    if recipe.data.path is None:
        return training.steps, None, sum(through) / count * batch
    steps = training.steps or steps_of(training.epochs or 1.0, count, batch)
    an_epoch = steps_of(1.0, count, batch)
    return steps, steps / an_epoch, sum(through) / an_epoch


def _activations(
    recipe: Recipe,
    checkpoint: BaseCheckpoint,
    memory: DeltaMemConfig,
    lengths: _Lengths | None,
    largest: int,
    notes: list[str],
    report: Report | None,
) -> int | None:
    """Bytes; None, and a note, where the fake step cannot run."""
    try:
        found = activation_bytes(recipe, checkpoint, memory, _shape(recipe, lengths), report)
    except DeltaMemError:
        raise  # training would say the same
    except Exception as error:  # whatever a model's code does without numbers
        notes.append(f"Activations: not computed ({type(error).__name__}: {first_line(error)})")
        return None
    return found + largest


def _shape(recipe: Recipe, lengths: _Lengths | None) -> StepShape:
    """The largest batch: the longest episodes, and without data the longest that the recipe allows, every token of an
    exchange scored."""
    data, batch = recipe.data, recipe.training.batch_size
    if lengths is not None:
        full = max((length for each in lengths.full for length in each), default=0)
        exchanges = max(len(each) for each in lengths.read)
        longest = (max(lengths.written), batch * exchanges, max(lengths.longest), full, batch * max(lengths.scored))
        return StepShape(batch, *longest)
    exchanges = batch * (1 if data.path is not None else data.facts_last)
    full = data.max_write_tokens + data.max_read_tokens
    scored = exchanges * data.max_read_tokens
    return StepShape(batch, data.max_write_tokens, exchanges, data.max_read_tokens, full, scored)
