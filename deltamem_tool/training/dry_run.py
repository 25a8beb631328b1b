"""Estimate a training run without training: its steps, data and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool._compat import Conv1D
from deltamem_tool.adapter.folder import AdapterFolder, read_adapter
from deltamem_tool.adapter.load import shapes_of
from deltamem_tool.base_model.attention import attention_layers, select_layers
from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.base_model.launch import launch_rank, launch_world_size
from deltamem_tool.base_model.limits import Limits
from deltamem_tool.base_model.tokenizer import read_tokenizer
from deltamem_tool.baselines.lora import new_lora
from deltamem_tool.baselines.static import Static, StaticAdapter
from deltamem_tool.data.encode import IGNORED, VIEWS
from deltamem_tool.data.store import EncodedEpisodes, EpisodeStatistics, in_memory
from deltamem_tool.io.names import check_revision
from deltamem_tool.memory.attach import fresh_adapter
from deltamem_tool.recipe.load import Recipe
from deltamem_tool.training.episodes import run_data
from deltamem_tool.training.launch import asks_to_shard, check_shards
from deltamem_tool.training.peak_bytes import Report, StepShape, activation_bytes, base_dtype, no_columns
from deltamem_tool.training.sharding import sharded_bytes
from deltamem_tool.training.trainer import steps_of

SAMPLED = 64  # generated episodes that are looked at, from the whole run
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
SCALE = 4 / 64
_QUANTISED = {"int8": 1.0, "nf4": 0.5 + SCALE}


@dataclass(frozen=True)
class PeakMemory:
    """Estimated peak memory of one process during a step, in bytes.

    The memory of CUDA itself, fragmentation and padding are not included. Activations, and so the total, are None if
    they could not be computed.
    """

    weights: int  # of the frozen base, or this process's part of it
    gathered: int  # of a base that processes share: weights that are whole while they compute
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None
    total: int | None


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run of a recipe."""

    trained_parameters: int
    base_parameters: int
    base_bytes: int
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
    notes: list[str]  # what could not be computed, or how it was counted
    is_main: bool = True  # of the processes of a launch, one speaks


def dry_run(recipe: Recipe, report: Report | None = None, processes: int | None = None) -> DryRun:
    """Estimate what `train(recipe)` would do.

    The weights of the base model are not needed: its config is enough for parameters and memory, and its tokenizer for
    the rest. Nothing is written except the encoded episodes, which are cached for the run itself.

    Args:
        recipe: the recipe.
        report: called with the number of simulated steps that are done, and their total. They measure the memory.
        processes: number of processes to estimate for; by default those of this launch.

    Raises:
        DeltaMemError: the recipe cannot be run.
    """
    check_revision(recipe.base, recipe.revision)
    checkpoint = BaseCheckpoint(recipe.base, recipe.revision, recipe.trust_remote_code)
    notes: list[str] = []
    training = recipe.training
    shards = asks_to_shard(recipe)
    processes = launch_world_size() if processes is None else processes
    if shards:
        check_shards(recipe, processes)
    read = Static.read if recipe.static else read_adapter
    folder = None if recipe.adapter is None else read(recipe.adapter)
    memory = recipe.memory if folder is None else folder.config
    skeleton = checkpoint.skeleton()
    weights = _base(skeleton, recipe, checkpoint.config, notes)
    base_parameters = sum(weight.numel() for weight in skeleton.parameters())
    base_bytes, largest = round(sum(weights.bytes_of.values())), weights.largest
    held, gathered = base_bytes, 0
    if shards:
        held, gathered = sharded_bytes(skeleton, weights.bytes_of, processes)
        held += round(weights.scales * (1 - 1 / processes))  # a process has all of them
    if recipe.lora is not None:
        lora: nn.Module = new_lora(skeleton, recipe.lora)
        trained = sum(weight.numel() for weight in lora.parameters() if weight.requires_grad)
        memory_bytes, granularity = 0, "token"
    elif recipe.static:
        with torch.device("meta"):
            static = StaticAdapter(memory, select_layers(attention_layers(skeleton), memory))
        trained = sum(weight.numel() for weight in static.parameters())
        memory_bytes, granularity = 0, "token"
    else:
        with torch.device("meta"):
            adapter = fresh_adapter(memory, select_layers(attention_layers(skeleton), memory), no_columns)
        shape = adapter.memory_shape
        numbers = sum(map(math.prod, shape.layers.values())) + len(adapter.layer_indices) * shape.segment_width
        memory_bytes = torch.float32.itemsize * numbers
        if isinstance(folder, AdapterFolder):
            folder.check_shapes(shapes_of(adapter))
        trained, granularity = adapter.num_parameters(), memory.granularity
        if len(adapter.layer_indices) < len(attention_layers(skeleton)):
            notes.append("Activations are counted as if every layer had a memory.")
    if not training.optimizer.startswith("adamw_torch"):
        notes.append(f"The optimizer {training.optimizer} is counted as AdamW.")
    if training.attention not in (None, "eager", "sdpa"):
        notes.append(f"The attention {training.attention} is counted as sdpa.")

    tokenizer = _tokenizer(checkpoint)
    steps, epochs = training.steps, None if training.steps else training.epochs or 1.0
    episodes, skipped, tokens = None, 0, None
    unrelated = recipe.data.max_read_tokens if recipe.data.unrelated else 0
    if tokenizer is None:
        notes.append(f"No data: {recipe.base} has no tokenizer. Memory is that of the longest episodes allowed.")
    else:
        data = run_data(recipe, tokenizer, granularity, processes, limits=Limits.from_config(checkpoint.config))
        steps, skipped = data.steps, data.skipped_rows
        if data.collator.unrelated is not None:
            unrelated = len(data.collator.unrelated.longest.ids)
        if isinstance(data.training, EncodedEpisodes):
            episodes = data.training
            an_epoch = steps_of(1.0, len(episodes), data.batch)
            epochs, tokens = steps / an_epoch, _tokens(recipe, episodes) / an_epoch
        else:
            generated, count = data.training, min(SAMPLED, len(data.training))
            between = len(generated) // count  # each a bit later, since every other one may be a user's own
            sample = [generated[i * len(generated) // count + i % between] for i in range(count)]
            episodes = in_memory(sample, data.collator.encoder, recipe.data.skip_bad_rows)
            tokens = _tokens(recipe, episodes) / len(episodes) * data.batch
            skipped += len(episodes.skipped)
    activations: int | None = None
    try:
        activations = (
            activation_bytes(recipe, checkpoint, memory, _largest_batch(recipe, episodes, unrelated), report) + largest
        )
    except RuntimeError as error:  # torch's, where the model's code needs numbers that fake tensors do not have
        why = (str(error).strip().splitlines() or [""])[0]
        notes.append(f"Activations: not computed ({type(error).__name__}: {why})")
    sizes = (held, gathered, 4 * trained, 4 * trained, ADAMW * trained)
    return DryRun(
        trained_parameters=trained,
        base_parameters=base_parameters,
        base_bytes=base_bytes,
        share=trained / base_parameters,
        memory_bytes=memory_bytes,
        episodes=None if episodes is None else episodes.statistics(),
        is_sample=recipe.data.path is None or recipe.data.mix > 0,
        skipped_rows=skipped,
        processes=processes,
        steps=steps,
        epochs=epochs,
        tokens_per_step=tokens,
        peak=PeakMemory(*sizes, activations, None if activations is None else sum(sizes) + activations),
        notes=notes,
        is_main=launch_rank() == 0,
    )


@dataclass(frozen=True)
class _Weights:
    bytes_of: dict[Tensor, float]  # of each weight of the base
    largest: int  # bytes of the largest that is unpacked while it is used
    scales: float = 0.0  # bytes of the scales of nf4, which `bytes_of` has too


def _base(skeleton: PreTrainedModel, recipe: Recipe, config: PretrainedConfig, notes: list[str]) -> _Weights:
    width = base_dtype(recipe, config).itemsize
    if getattr(config, "quantization_config", None):
        notes.append("The base is stored quantised: its weights are counted as if they were not.")
    bytes_of: dict[Tensor, float] = {weight: weight.numel() * width for weight in skeleton.parameters()}
    bytes_each = _QUANTISED.get(recipe.training.quantize)
    if bytes_each is None:
        return _Weights(bytes_of, 0)
    head = skeleton.get_output_embeddings()  # type: ignore[no-untyped-call]  # it has no hints
    packed = [m.weight for m in skeleton.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    bytes_of |= {weight: weight.numel() * bytes_each for weight in packed}
    scales = SCALE * sum(weight.numel() for weight in packed) if recipe.training.quantize == "nf4" else 0.0
    return _Weights(bytes_of, max((weight.numel() for weight in packed), default=0) * width, scales)


def _tokenizer(checkpoint: BaseCheckpoint) -> PreTrainedTokenizerBase | None:
    """None where a folder has not one file of it: transformers would make an empty one from the config.

    Raises:
        ArchitectureError: it cannot be used.
    """
    source = checkpoint.source
    is_there = source.is_file() or any((source / name).is_file() for name in _TOKENIZER_FILES)
    return read_tokenizer(source) if is_there else None


def _tokens(recipe: Recipe, episodes: EncodedEpisodes) -> float:
    """Tokens that go through the model in an epoch, without padding."""
    alone, recent, full = (pc.sum(_lengths(episodes, view)).as_py() or 0 for view in VIEWS)
    if recipe.lora is not None:
        return float(full)
    dropout = recipe.objective.context_dropout if recent else 1.0
    written = 0 if recipe.static else sum(episodes.lengths)
    return float(written + (1 - dropout) * recent + dropout * alone)


def _lengths(episodes: EncodedEpisodes, view: str) -> pa.ChunkedArray:
    """Tokens of every exchange in a view."""
    return pc.list_value_length(pc.struct_field(pc.list_flatten(episodes.column(view)), "ids"))


def _largest_batch(recipe: Recipe, episodes: EncodedEpisodes | None, unrelated: int) -> StepShape:
    """The longest episodes; without data the longest that the recipe allows, every token of an exchange scored.

    `unrelated` is the length of the longest exchange that no memory is needed for.
    """
    data, batch = recipe.data, recipe.training.batch_size
    if episodes is None:
        is_generated = data.path is None or data.mix > 0
        exchanges = batch * (data.facts_last if is_generated else 1)
        full = data.max_write_tokens + data.max_read_tokens
        scored = exchanges * data.max_read_tokens
        return StepShape(batch, data.max_write_tokens, exchanges, data.max_read_tokens, full, scored, unrelated)
    alone, recent, full = (pc.max(_lengths(episodes, view)).as_py() or 0 for view in VIEWS)
    exchanges = batch * pc.max(pc.list_value_length(episodes.column("exchanges"))).as_py()
    scored = batch * max(_count_scored(chunk).max() for chunk in episodes.column("exchanges").chunks)
    return StepShape(batch, max(episodes.lengths), exchanges, max(alone, recent), full, int(scored), unrelated)


def _count_scored(exchanges: pa.ListArray) -> np.ndarray:
    """Scored tokens of each episode."""
    labels = exchanges.flatten().field("labels")
    is_scored = pc.not_equal(labels.flatten(), IGNORED).to_numpy(zero_copy_only=False)
    each = np.bincount(labels.value_parent_indices(), is_scored, len(labels))
    return np.bincount(exchanges.value_parent_indices(), each, len(exchanges))
