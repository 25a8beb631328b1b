"""What a step's loss is, held against the equations; and that how it is computed does not matter."""

from __future__ import annotations

import pytest
import torch
from helpers.naive_model import naive_run
from helpers.tiny import VOCABULARY, base_parameters, patched_model, randomise, tokens
from torch import nn
from training.batches import episode_batch, positions, with_full_context, with_unrelated
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Lfm2Config, OPTConfig

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool._compat import GradientCheckpointingLayer
from deltamem_tool.data.encode import IGNORED
from deltamem_tool.errors import ConfigError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.recipe.load import ObjectiveOptions
from deltamem_tool.training.gradient_checkpointing import recomputing
from deltamem_tool.training.loss import EpisodeModel

LOSS_TOLERANCE = 2e-5  # float32 against the float64 equations; the loss is about 5
SLOPE_TOLERANCE = 2e-3  # relative, of a derivative by central differences
SAME_TOLERANCE = 2e-5  # float32, the same sums in another order; gradients are of order 1


def naive_losses(model, batch) -> list[float]:
    """Of every scored token: each history and exchange by itself, in float64, all logits."""
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


def gradients(model, batch, **options):
    """The loss, and every gradient of the adapter."""
    adapter = adapter_of(model)
    adapter.zero_grad()
    loss = EpisodeModel(model, **options)(**batch)["loss"]
    loss.backward()
    assert all(parameter.grad is None for parameter in base_parameters(model))
    return loss.item(), {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}


def same(found, expected, tolerance=SAME_TOLERANCE):
    assert abs(found[0] - expected[0]) < tolerance
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, atol=tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ["qwen3", "llama", "smollm3"])
def test_the_loss_is_what_the_equations_say(name):
    model = patched_model(name, state_heads=2)
    batch = episode_batch()
    with torch.no_grad():
        loss = EpisodeModel(model)(**batch)["loss"]
    assert abs(loss.item() - naive_loss(model, batch)) < LOSS_TOLERANCE
    batch["rows"] = torch.tensor([0, 1, 1])  # whose memory is read decides
    with torch.no_grad():
        assert abs(EpisodeModel(model)(**batch)["loss"].item() - loss.item()) > 100 * LOSS_TOLERANCE


def test_gradients_are_the_slopes_of_the_equations():
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
def test_logits_are_the_models_own(name):
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


def test_logits_are_made_where_they_are_scored(monkeypatch):
    model, shapes = patched_model(), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    EpisodeModel(model, ObjectiveOptions(full_context_kl=1.0))(**with_full_context(episode_batch()))
    assert [shape.numel() for shape in shapes] == [4 * VOCABULARY] * 2


@pytest.mark.parametrize("granularity", ["token", "message"])
@pytest.mark.parametrize("name", ["qwen3", *OTHERS])
@pytest.mark.parametrize("chunk", [1, 4, 5, 12])
def test_chunks_are_one_call(name, granularity, chunk):
    """The same loss and the same gradients, whatever the cut and whichever the shorter conversation."""
    options = {"granularity": granularity, "rank": 4}
    model = patched_model(**options) if name == "qwen3" else other_model(name, **options)
    batch = episode_batch(lengths=(12, 5), segments=granularity == "message")
    shared = {"objective": ObjectiveOptions(history_kl=0.5)}
    same(gradients(model, batch, write_chunk=chunk, **shared), gradients(model, batch, **shared))


def test_gradients_flow_through_the_last_chunks():
    """What the last two chunks wrote has the gradients that it has when the state before them is a constant."""
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


def test_recomputing_keeps_less():
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


def test_recomputing_needs_layers():
    refused = pytest.raises(ConfigError, match=r"(?s)cannot recompute.*gradient_checkpointing")
    with refused, recomputing(nn.Linear(1, 1)):
        pass


@pytest.mark.parametrize("segments", [False, True])
def test_sparsity_looks_at_what_was_written(segments):
    """(mean β − target)² by conversation and layer, over the tokens of the write pass, or the ends of its segments."""
    model = patched_model(granularity="message" if segments else "token")
    batch = episode_batch(lengths=(9, 5), segments=segments)
    target, weight = 0.3, 2.0
    plain = EpisodeModel(model)(**batch)
    output = EpisodeModel(model, ObjectiveOptions(write_sparsity=weight, write_target=target))(**batch)
    adapter, inputs = adapter_of(model), {}

    def keep(layer, hidden):
        inputs.setdefault(layer, hidden)  # the write pass comes first

    handles = [
        model.model.layers[layer].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: keep(layer, kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in adapter.layer_indices
    ]
    EpisodeModel(model)(**batch)
    for handle in handles:
        handle.remove()
    penalties, means = [], []
    for row, length in enumerate((9, 5)):
        for layer, hidden in inputs.items():
            gate = adapter.layer(layer).gate
            x = hidden[row, :length]
            if segments:  # the mean of each whole segment
                x = torch.stack([x[start : start + 3].mean(0) for start in range(0, length - 2, 3)])
            means.append(torch.sigmoid(x @ gate.weight.T + gate.bias).mean().item())
            penalties.append((means[-1] - target) ** 2)
    assert abs(output["sparsity"].item() - sum(penalties) / len(penalties)) < 1e-6
    assert abs(output["gates"].mean().item() - sum(means) / len(means)) < 1e-6
    assert abs(output["loss"].item() - plain["loss"].item() - weight * output["sparsity"].item()) < 1e-6
    assert output["answer"].item() == plain["answer"].item()


def test_the_penalty_opens_or_closes_gates():
    model = patched_model()
    batch = episode_batch()
    for target, sign in ((0.0, 1), (1.0, -1)):
        bare = gradients(model, batch)[1]
        pushed = gradients(model, batch, objective=ObjectiveOptions(write_sparsity=10.0, write_target=target))[1]
        name = "layers.0.gate.bias"
        assert ((pushed[name] - bare[name]) * sign > 0).all()


def test_divergence_is_from_the_base_with_everything_in_view():
    """By its definition, from logits of the base alone and of the memory alone."""
    model = patched_model()
    batch = with_full_context(episode_batch())
    output = EpisodeModel(model, ObjectiveOptions(full_context_kl=1.0))(**batch)
    from deltamem_tool import detach

    with torch.no_grad():
        step = EpisodeModel(model)
        memory = step.write(batch["write_ids"], batch["write_mask"]).memory
        said = step.answer(memory.select(batch["rows"]), batch["read_ids"], batch["read_mask"], batch["scored"])
        detach(model)
        whole = model(batch["full_ids"], attention_mask=batch["full_mask"]).logits
        wanted = whole.flatten(0, 1)[batch["full_scored"]].double().softmax(-1)
    by_hand = (wanted * (wanted.log() - said.double().log_softmax(-1))).sum() / len(said)
    assert abs(output["kl"].item() - by_hand.item()) < LOSS_TOLERANCE
    assert abs(output["loss"].item() - output["answer"].item() - output["kl"].item()) < 1e-6


@pytest.mark.parametrize("chunk", [None, 5])
def test_the_history_diverges_from_the_base_while_it_is_written(chunk):
    """Each history by itself, by the equations: with the memory that it writes, and with none that is written."""
    model = patched_model(state_heads=2)
    batch, means = episode_batch(lengths=(12, 5)), []
    for ids, mask in zip(batch["write_ids"], batch["write_mask"], strict=True):
        history = ids[mask.bool()].tolist()
        said = naive_run(model, history)[0].log_softmax(-1)
        wanted = naive_run(model, history, writes=[False] * len(history))[0].log_softmax(-1)
        means.append((wanted.exp() * (wanted - said)).sum(-1).mean().item())
    output = EpisodeModel(model, ObjectiveOptions(history_kl=0.5), write_chunk=chunk)(**batch)
    expected = sum(means) / len(means)
    assert abs(output["history_kl"].item() - expected) < LOSS_TOLERANCE < 0.01 * expected
    assert abs(output["loss"].item() - output["answer"].item() - 0.5 * expected) < LOSS_TOLERANCE


def test_what_needs_no_memory_diverges_from_the_base():
    """By the equations: each exchange with the memory of its conversation, and with none; the mean of their means."""
    model = patched_model(state_heads=2)
    batch, means = with_unrelated(episode_batch()), []
    for row, columns in enumerate(([2, 3], [1])):
        history = batch["write_ids"][row][batch["write_mask"][row].bool()].tolist()
        exchange = batch["unrelated_ids"][row][batch["unrelated_mask"][row].bool()].tolist()
        reads = [False] * len(exchange)
        said = naive_run(model, exchange, naive_run(model, history)[1], reads)[0].log_softmax(-1)
        wanted = naive_run(model, exchange, writes=reads)[0].log_softmax(-1)
        means.append((wanted.exp() * (wanted - said)).sum(-1)[columns].mean().item())
    output = EpisodeModel(model, ObjectiveOptions(unrelated_kl=0.5))(**batch)
    expected = sum(means) / len(means)
    assert abs(output["unrelated_kl"].item() - expected) < LOSS_TOLERANCE < 0.01 * expected
    assert abs(output["loss"].item() - output["answer"].item() - 0.5 * expected) < LOSS_TOLERANCE


def test_the_divergence_of_what_needs_no_memory_is_learned():
    """Steps against its gradients alone make it less."""
    model = patched_model()
    batch, objective = with_unrelated(episode_batch()), ObjectiveOptions(unrelated_kl=1.0)
    step, divergences = EpisodeModel(model, objective), []
    for _ in range(5):
        adapter_of(model).zero_grad()
        output = step(**batch)
        divergences.append(output["unrelated_kl"].item())
        (pushed, bare) = (gradients(model, batch, objective=o)[1] for o in (objective, ObjectiveOptions()))
        slope = {name: pushed[name] - bare[name] for name in pushed}
        size = sum(gradient.square().sum() for gradient in slope.values())
        with torch.no_grad():
            for name, parameter in adapter_of(model).named_parameters():
                parameter -= 0.02 * slope[name] / size.sqrt()
    assert divergences == sorted(divergences, reverse=True) and divergences[-1] < 0.9 * divergences[0]


def test_the_teacher_gets_no_gradient_and_writes_nothing():
    model = patched_model()
    batch = with_full_context(episode_batch())
    batch["full_ids"] = tokens(3, batch["full_ids"].shape[1], seed=5) * batch["full_mask"]
    objective = ObjectiveOptions(full_context_kl=0.0)
    same(gradients(model, batch, objective=objective), gradients(model, episode_batch()))


def test_a_step_in_parts_is_a_step():
    """Losses that were divided by what the whole batch scores add up to the whole batch's."""
    model = patched_model()
    objective = ObjectiveOptions(write_sparsity=0.7, full_context_kl=0.3, history_kl=0.4, unrelated_kl=0.6)
    whole = with_unrelated(with_full_context(episode_batch()))
    expected = gradients(model, whole, objective=objective)
    total, summed = 0.0, {}
    for row in (0, 1):
        mine = whole["rows"] == row
        part = {name: whole[name][row : row + 1] for name in ("write_ids", "write_mask")}
        part |= {name: whole[name][mine] for name in ("read_ids", "read_mask", "labels")}
        part |= {"rows": torch.zeros(int(mine.sum()), dtype=torch.long)}
        part = with_full_context(part | positions(part["labels"]))
        part |= {name: whole[name][row : row + 1] for name in ("unrelated_ids", "unrelated_mask")}
        places, length = whole["unrelated_scored"], whole["unrelated_ids"].shape[1]
        part["unrelated_scored"] = places[places // length == row] - row * length
        adapter_of(model).zero_grad()
        counts = {"num_items_in_batch": len(whole["targets"]), "conversations": 2}
        loss = EpisodeModel(model, objective)(**part, **counts)["loss"]
        loss.backward()
        total += loss.item()
        for name, parameter in adapter_of(model).named_parameters():
            summed[name] = summed.get(name, 0) + parameter.grad
    same((total, summed), expected)


def test_traces_of_a_gradient_are_dropped():
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


def test_a_step_takes_no_fingerprint(monkeypatch):
    """The weights are others after every step."""
    model = patched_model(rank=4)
    adapter, batch = adapter_of(model), episode_batch()
    with monkeypatch.context() as patch:
        patch.setattr("deltamem_tool.memory.weights.hashlib", None)
        EpisodeModel(model)(**batch)["loss"].backward()
    memory = EpisodeModel(model).write(batch["write_ids"], batch["write_mask"]).memory
    assert memory.adapter == adapter.fingerprint and len(memory.adapter) == 64
