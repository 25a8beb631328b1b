"""The addressing loss, compared with a loop over its definition."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tiny import patched_model
from training.batches import episode_batch

from deltamem_tool.errors import ConfigError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.recipe.load import ObjectiveOptions, Recipe
from deltamem_tool.segments.tags import SegmentTag
from deltamem_tool.training.addressing import TEMPERATURE, Addresses, addressing_loss, hidden_states_of
from deltamem_tool.training.loss import EpisodeModel

TOLERANCE = 1e-5  # float32 against float64; the loss is about 3


def telling_batch(segments=False):
    """Four tokens: one is told twice, one once, one only in the other conversation, one once and in padding."""
    batch = episode_batch(segments=segments)
    written, read, targets = batch["write_ids"], batch["read_ids"], batch["targets"]
    written[0, 1] = written[0, 5] = targets[0]
    written[0, 3] = targets[1]
    written[1, 2] = targets[2]
    written[1, 1] = written[1, 6] = targets[3]
    read[0, 0] = written[0, 0]
    return batch


def keys_of(batch, row):
    """The columns of each key in a history: a token, or the tokens of a segment."""
    columns = [column for column, valid in enumerate(batch["write_mask"][row].tolist()) if valid]
    if "write_segment_tags" not in batch:
        return [[column] for column in columns]
    segments = [[]]
    for column in columns:
        segments[-1].append(column)
        if batch["write_segment_tags"][row, column] == SegmentTag.LAST:
            segments.append([])
    return segments[:-1]  # tokens after the last end are not written


def naive_addresses(batch):
    """(asking, conversation, keys) of every scored token that occurs in the history."""
    length = batch["read_ids"].shape[1]
    addresses = []
    for place, target in zip(batch["scored"].tolist(), batch["targets"].tolist(), strict=True):
        exchange, column = divmod(place, length)
        row = batch["rows"][exchange].item()
        ids = batch["write_ids"][row].tolist()
        keys = [n for n, key in enumerate(keys_of(batch, row)) if target in [ids[w] for w in key]]
        if keys and target not in batch["read_ids"][exchange, : column + 1].tolist():
            addresses.append(((exchange, column), row, keys))
    return addresses


def naive_loss(model, batch):
    adapter, addresses = adapter_of(model), naive_addresses(batch)
    with torch.no_grad(), hidden_states_of(adapter) as hidden:
        cache = MemoryCache(model)
        cache.segment_tags = batch.get("write_segment_tags")
        model(batch["write_ids"], attention_mask=batch["write_mask"], cache=cache)
        written = hidden.take()
        read_cache = MemoryCache(model, write=False)
        read_cache.memory = cache.memory.select(batch["rows"])
        model(batch["read_ids"], attention_mask=batch["read_mask"], cache=read_cache)
        read = hidden.take()
    pairs = sorted({(row, key) for _, row, keys in addresses for key in keys})
    by_row = {row: [] for row in range(len(batch["write_ids"]))}
    for (exchange, place), row, keys in addresses:
        losses = []
        for index in adapter.layer_indices:
            layer = adapter.layer(index)
            for head in range(layer.config.state_heads):
                cut = slice(head * layer.config.rank, (head + 1) * layer.config.rank)

                def unit(weight, x, cut=cut):
                    y = torch.tanh(weight[cut].double() @ x.double())
                    return y / y.norm()

                query = unit(layer.query.weight, read[index][exchange, place])
                places = [(row, n) for n in range(len(keys_of(batch, row)))]
                places += [each for each in pairs if each[0] != row]
                hidden = {each: written[index][each[0], keys_of(batch, each[0])[each[1]]].mean(0) for each in places}
                scores = {
                    each: math.exp(query @ unit(layer.key.weight, mean) / TEMPERATURE) for each, mean in hidden.items()
                }
                losses.append(math.log(sum(scores.values())) - math.log(sum(scores[row, n] for n in keys)))
        by_row[row].append((sum(losses) / len(losses), 1 / len(keys)))
    means = [sum(x * w for x, w in each) / sum(w for _, w in each) if each else 0.0 for each in by_row.values()]
    return sum(means) / len(means)


@torch.no_grad()
@pytest.mark.parametrize(
    ("granularity", "keys"), [("token", [[1, 5], [3], [1]]), ("message", [[0, 1], [1], [0]])], ids=["token", "message"]
)
def test_the_addressing_loss_matches_its_definition(granularity, keys):
    model = patched_model(state_heads=2, granularity=granularity)
    batch = telling_batch(segments=granularity == "message")
    assert [each for _, _, each in naive_addresses(batch)] == keys
    parts = EpisodeModel(model, ObjectiveOptions(addressing=2.0))(**batch)
    assert abs(parts["addressing"].item() - naive_loss(model, batch)) < TOLERANCE
    plain = EpisodeModel(model)(**batch)["loss"]
    torch.testing.assert_close(parts["loss"], plain + 2.0 * parts["addressing"])


@torch.no_grad()
def test_long_segments_of_a_bfloat16_base_have_their_exact_means():
    """A sum in bfloat16 stops growing after a few hundred tokens."""
    generator, length = torch.Generator().manual_seed(0), 2000
    adapter = adapter_of(patched_model(granularity="message"))
    width = adapter.layer(adapter.layer_indices[0]).key.in_features
    ids, tags = torch.zeros(1, length, dtype=torch.long), torch.full((1, length), SegmentTag.INSIDE, dtype=torch.int8)
    ids[0, 7], tags[0, 9], tags[0, -1] = 1, SegmentTag.LAST, SegmentTag.LAST
    hidden = 1 + torch.rand(1, length, width, generator=generator).bfloat16()
    read = torch.rand(1, 2, width, generator=generator).bfloat16()
    exchange = {"read_ids": torch.zeros(1, 2, dtype=torch.long), "rows": torch.zeros(1, dtype=torch.long)}
    scored = {"scored": torch.zeros(1, dtype=torch.long), "targets": torch.ones(1, dtype=torch.long)}

    def loss(ids, tags, written):
        addresses = Addresses.from_batch(ids, None, **exchange, **scored, write_segment_tags=tags)
        layers = adapter.layer_indices
        return addressing_loss(adapter, dict.fromkeys(layers, written), dict.fromkeys(layers, read), None, addresses)

    segments = hidden.double().split([10, length - 10], dim=1)
    means = torch.cat([segment.mean(1, keepdim=True) for segment in segments], dim=1).float()
    expected = loss(torch.tensor([[1, 0]]), torch.full((1, 2), SegmentTag.LAST, dtype=torch.int8), means)
    torch.testing.assert_close(loss(ids, tags, hidden), expected, atol=TOLERANCE, rtol=0)


def test_tokens_visible_in_the_exchange_are_not_scored():
    batch = telling_batch()
    place = batch["scored"][0].item()
    batch["read_ids"].view(-1)[place - 1] = batch["targets"][0]
    names = ("write_ids", "write_mask", "read_ids", "scored", "targets", "rows")
    addresses = Addresses.from_batch(**{name: batch[name] for name in names})
    assert place not in addresses.query_places.tolist()
    assert len(addresses.query_places) == len(naive_addresses(batch)) == 2


def test_the_addressing_loss_trains_only_queries_and_keys():
    model, batch = patched_model(state_heads=2), telling_batch()
    adapter, gradients = adapter_of(model), []
    for weight in (0.0, 1.0):
        adapter.zero_grad()
        EpisodeModel(model, ObjectiveOptions(addressing=weight))(**batch)["loss"].backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in adapter.named_parameters()})
    for name, before in gradients[0].items():
        taught = name.split(".")[-2] in ("query", "key")
        assert torch.allclose(before, gradients[1][name], atol=1e-6) != taught, name


def test_recomputed_layers_and_chunks_change_nothing():
    model, batch = patched_model(state_heads=2), telling_batch()
    objective = ObjectiveOptions(addressing=1.0)
    expected = EpisodeModel(model, objective)(**batch)["addressing"]
    for options in ({"recompute": True}, {"write_chunk": 3}):
        parts = EpisodeModel(model, objective, **options)(**batch)
        torch.testing.assert_close(parts["addressing"], expected, atol=TOLERANCE, rtol=0)
        parts["loss"].backward()


def test_the_loss_is_zero_when_no_token_has_to_be_found():
    model, batch = patched_model(), episode_batch()
    batch["write_ids"].fill_(0)
    batch["targets"].fill_(1)
    parts = EpisodeModel(model, ObjectiveOptions(addressing=1.0))(**batch)
    assert parts["addressing"] == 0
    parts["loss"].backward()


def test_addressing_with_truncated_backpropagation_raises():
    with pytest.raises(ConfigError, match="addressing"):
        Recipe(base="b", out="o", objective={"addressing": 1.0}, training={"bptt": 1, "write_chunk": 8})
