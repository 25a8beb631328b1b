"""The loss of a step, compared with the equations, and that ways to compute it faster do not change it."""

from __future__ import annotations

import pytest
import torch
from helpers.naive_model import naive_run
from helpers.tiny import VOCABULARY, base_parameters, patched_model, randomise
from torch import nn
from training.batches import episode_batch, positions, with_full_context, with_unrelated
from training.steps import LOSS_TOLERANCE, SAME_TOLERANCE, gradients, same
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Lfm2Config, OPTConfig

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool._compat import GradientCheckpointingLayer
from deltamem_tool.data.encode import IGNORED
from deltamem_tool.errors import ConfigError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.recipe.load import ObjectiveOptions
from deltamem_tool.training.gradient_checkpointing import recompute_layers
from deltamem_tool.training.loss import EpisodeModel

SLOPE_TOLERANCE = 2e-3  # relative, of a derivative by central differences


def naive_losses(model, batch) -> list[float]:
    """The loss of every scored token, with each history and exchange run by itself, in float64 and with all logits."""
    losses = []
    for row, conversation in enumerate(batch["rows"].tolist()):
        history = batch["write_ids"][conversation][batch["write_mask"][conversation].bool()].tolist()
        exchange = batch["read_ids"][row][batch["read_mask"][row].bool()].tolist()
        _, states = naive_run(model, history)
        logits, after = naive_run(model, exchange, states, [False] * len(exchange))
        assert all(torch.equal(after[layer], state) for layer, state in states.items())
        for position, label in enumerate(batch["labels"][row].tolist()):
            if label != IGNORED:
                losses.append(-logits[position - 1].log_softmax(-1)[label].item())
    return losses


def naive_loss(model, batch) -> float:
    losses = naive_losses(model, batch)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["qwen3", "llama", "smollm3"])
def test_the_loss_matches_the_equations(name):
    model = patched_model(name, state_heads=2)
    batch = episode_batch()
    with torch.no_grad():
        loss = EpisodeModel(model)(**batch)["loss"]
    assert abs(loss.item() - naive_loss(model, batch)) < LOSS_TOLERANCE
    batch["rows"] = torch.tensor([0, 1, 1])  # whose memory is read decides
    with torch.no_grad():
        assert abs(EpisodeModel(model)(**batch)["loss"].item() - loss.item()) > 100 * LOSS_TOLERANCE


def test_gradients_match_finite_differences_of_the_equations():
    """Every tensor of the adapter, and its derivative: keys, values and gates act through the state alone."""
    model = patched_model(branches=("q", "k", "v", "o"))
    batch = episode_batch()
    adapter = adapter_of(model)
    EpisodeModel(model)(**batch)["loss"].backward()
    assert all(parameter.grad is None for parameter in base_parameters(model))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-5, f"no gradient reaches {name}"
        if name.startswith("layers.1."):
            continue  # the slopes of one layer are enough to wait for
        direction = torch.randn(parameter.shape, generator=generator)
        direction *= parameter.grad.norm() / (parameter.grad * direction).sum().abs()  # so that the slope is not near 0
        step = 2e-3 / direction.norm()
        kept, losses = parameter.detach().clone(), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(kept + sign * step * direction)
            losses.append(naive_loss(model, batch))
        with torch.no_grad():
            parameter.copy_(kept)
        slope, expected = (losses[0] - losses[1]) / (2 * step.item()), (parameter.grad * direction).sum().item()
        assert abs(slope - expected) < SLOPE_TOLERANCE * abs(expected) + 1e-4, f"{name}: {slope} is not {expected}"


GEMMA2 = Gemma2Config(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=4,
    final_logit_softcapping=2.0,  # so tight that leaving it out is seen
    initializer_range=0.2,
)
OPT = OPTConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    ffn_dim=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    word_embed_proj_dim=32,
    init_std=0.2,
    pad_token_id=0,
)
GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
LFM2 = Lfm2Config(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    layer_types=["conv", "full_attention", "full_attention"],
    initializer_range=0.2,
)
OTHERS = {"gemma2": GEMMA2, "opt": OPT, "gpt2": GPT2, "lfm2": LFM2}


def other_model(name, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHERS[name]).eval()
    randomise(attach(model, DeltaMemConfig(**{"rank": 4, **options})))
    return model


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_logits_match_the_forward_pass_of_the_model(name):
    """Capped, scaled, behind a projection: whatever its own forward pass does to them."""
    model = other_model(name)
    batch = episode_batch()
    step = EpisodeModel(model)
    memory = step.write(batch["write_ids"], batch["write_mask"]).memory
    logits = step.answer(memory.select(batch["rows"]), batch["read_ids"], batch["read_mask"], batch["scored"])
    from deltamem_tool import MemoryCache

    cache = MemoryCache(model, memory.select(batch["rows"]), write=False)
    whole = model(batch["read_ids"], attention_mask=batch["read_mask"], cache=cache).logits
    torch.testing.assert_close(logits, whole.flatten(0, 1)[batch["scored"]], atol=1e-5, rtol=0)
    assert logits.shape == (len(batch["targets"]), VOCABULARY)


def test_logits_are_computed_only_for_scored_tokens(monkeypatch):
    model, shapes = patched_model(), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    EpisodeModel(model, ObjectiveOptions(full_context_kl=1.0))(**with_full_context(episode_batch()))
    assert [shape.numel() for shape in shapes] == [4 * VOCABULARY] * 2


@pytest.mark.parametrize("granularity", ["token", "message"])
@pytest.mark.parametrize("name", ["qwen3", *OTHERS])
@pytest.mark.parametrize("chunk", [1, 4, 5, 12])
def test_chunking_changes_neither_loss_nor_gradients(name, granularity, chunk):
    """The same loss and the same gradients, whatever the cut and whichever the shorter conversation."""
    options = {"granularity": granularity, "rank": 4}
    model = patched_model(**options) if name == "qwen3" else other_model(name, **options)
    batch = episode_batch(lengths=(12, 5), segments=granularity == "message")
    shared = {"objective": ObjectiveOptions(history_kl=0.5)}
    same(gradients(model, batch, write_chunk=chunk, **shared), gradients(model, batch, **shared))


def test_gradients_flow_only_through_the_last_chunks():
    """The last two chunks have the gradients that they have when the state before them is a constant."""
    model = patched_model()
    batch = episode_batch(lengths=(12, 9))
    cut = gradients(model, batch, write_chunk=3, bptt=2)
    whole = gradients(model, batch)
    assert abs(cut[0] - whole[0]) < SAME_TOLERANCE
    assert any((cut[1][name] - whole[1][name]).abs().max() > 1e-3 for name in cut[1])
    same(gradients(model, batch, write_chunk=3, bptt=4), whole)
    adapter = adapter_of(model)
    adapter.zero_grad()
    losses = []
    for row, length in enumerate((12, 9)):  # one by one, the head of each with no gradients
        from deltamem_tool import MemoryCache

        ids, cache = batch["write_ids"][row : row + 1, :length], MemoryCache(model)
        with torch.no_grad():
            model(ids[:, : length - 6], cache=cache)
        model(ids[:, length - 6 :], cache=cache)
        mine = batch["rows"] == row
        reading = MemoryCache(model, cache.memory.fork(int(mine.sum())), write=False)
        mask = batch["read_mask"][mine]
        logits = model(batch["read_ids"][mine], attention_mask=mask, cache=reading).logits
        chosen = positions(batch["labels"][mine])
        flat = logits.flatten(0, 1)[chosen["scored"]]
        losses.append(nn.functional.cross_entropy(flat, chosen["targets"], reduction="sum"))
    (sum(losses) / len(batch["targets"])).backward()
    same(cut, (cut[0], {name: parameter.grad for name, parameter in adapter.named_parameters()}))


@pytest.mark.parametrize("granularity", ["token", "message"])
@pytest.mark.parametrize("name", ["qwen3", *OTHERS])
@pytest.mark.parametrize("chunks", [{}, {"write_chunk": 5}, {"write_chunk": 5, "bptt": 1}])
def test_recomputing_changes_nothing(name, granularity, chunks):
    options = {"granularity": granularity, "rank": 4}
    model = patched_model(**options) if name == "qwen3" else other_model(name, **options)
    batch = with_unrelated(with_full_context(episode_batch(lengths=(12, 8), segments=granularity == "message")))
    objective = ObjectiveOptions(write_sparsity=0.5, full_context_kl=0.5, history_kl=0.5, unrelated_kl=0.5)
    expected = gradients(model, batch, objective=objective, **chunks)
    same(gradients(model, batch, objective=objective, recompute=True, **chunks), expected)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers and not any("forward" in vars(layer) for layer in layers)


def test_recomputing_saves_memory():
    """Tensors that wait for the backward pass, in bytes."""

    def kept(**options):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.untyped_storage().data_ptr(), (t, t.untyped_storage().nbytes()))[0],
            lambda t: t,
        ):
            loss = EpisodeModel(model, **options)(**batch)["loss"]
        assert loss.requires_grad
        return sum(size for _, size in sizes.values())

    model = patched_model()
    batch = episode_batch(lengths=(64, 64))
    assert kept(recompute=True) < 0.5 * kept()


def test_recomputing_without_layers_raises():
    refused = pytest.raises(ConfigError, match=r"(?s)cannot recompute.*gradient_checkpointing")
    with refused, recompute_layers(nn.Linear(1, 1)):
        pass


def test_denormal_gradients_are_set_to_zero():
    """A CPU's products of denormal numbers are many times slower than others."""
    model = patched_model(rank=4)
    randomise(adapter_of(model))
    hidden = torch.randn(1, 1000, model.config.hidden_size, requires_grad=True)
    memory = adapter_of(model).layer(0)
    _, state, *_ = memory(hidden, torch.zeros(1, 1, 4, 4), None, True)
    state.square().sum().backward()
    assert hidden.grad is not None
    sizes = hidden.grad.abs().amax(dim=(0, 2))
    assert sizes[0] == 0 and sizes[-1] > 1e-6
    assert 1e-30 < sizes[sizes > 0].min() < 1e-20, "some are kept that matter to nobody, so that none is lost"


def test_a_step_does_not_compute_the_fingerprint(monkeypatch):
    """The weights are others after every step."""
    model = patched_model(rank=4)
    adapter, batch = adapter_of(model), episode_batch()
    with monkeypatch.context() as patch:
        patch.setattr("deltamem_tool.memory.weights.hashlib", None)
        EpisodeModel(model)(**batch)["loss"].backward()
    memory = EpisodeModel(model).write(batch["write_ids"], batch["write_mask"]).memory
    assert memory.adapter == adapter.fingerprint and len(memory.adapter) == 64
