"""Terms added to the answers' cross-entropy, each against its definition: gate penalties, divergences from the base."""

from __future__ import annotations

import pytest
import torch
from helpers.naive_model import naive_run
from helpers.tiny import patched_model, tokens
from training.batches import episode_batch, positions, with_full_context, with_unrelated
from training.steps import LOSS_TOLERANCE, gradients, same

from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.recipe.load import ObjectiveOptions
from deltamem_tool.training.loss import EpisodeModel


@pytest.mark.parametrize("segments", [False, True])
def test_write_sparsity_matches_its_definition(segments):
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


def test_the_write_sparsity_penalty_opens_or_closes_gates():
    model = patched_model()
    batch = episode_batch()
    for target, sign in ((0.0, 1), (1.0, -1)):
        bare = gradients(model, batch)[1]
        pushed = gradients(model, batch, objective=ObjectiveOptions(write_sparsity=10.0, write_target=target))[1]
        name = "layers.0.gate.bias"
        assert ((pushed[name] - bare[name]) * sign > 0).all()


def test_full_context_divergence_matches_its_definition():
    """By its definition, from logits of the base alone and of the memory alone."""
    model = patched_model()
    batch = with_full_context(episode_batch())
    output = EpisodeModel(model, ObjectiveOptions(full_context_kl=1.0))(**batch)
    from deltamem_tool import detach

    with torch.no_grad():
        step = EpisodeModel(model)
        memory = step.write(batch["write_ids"], batch["write_mask"]).memory
        logits = step.answer(memory.select(batch["rows"]), batch["read_ids"], batch["read_mask"], batch["scored"])
        detach(model)
        whole = model(batch["full_ids"], attention_mask=batch["full_mask"]).logits
        teacher = whole.flatten(0, 1)[batch["full_scored"]].double().softmax(-1)
    by_hand = (teacher * (teacher.log() - logits.double().log_softmax(-1))).sum() / len(logits)
    assert abs(output["kl"].item() - by_hand.item()) < LOSS_TOLERANCE
    assert abs(output["loss"].item() - output["answer"].item() - output["kl"].item()) < 1e-6


@pytest.mark.parametrize("chunk", [None, 5])
def test_history_divergence_matches_the_equations(chunk):
    """Each history by itself, by the equations: with the memory that it writes, and with none that is written."""
    model = patched_model(state_heads=2)
    batch, means = episode_batch(lengths=(12, 5)), []
    for ids, mask in zip(batch["write_ids"], batch["write_mask"], strict=True):
        history = ids[mask.bool()].tolist()
        with_memory = naive_run(model, history)[0].log_softmax(-1)
        without_memory = naive_run(model, history, writes=[False] * len(history))[0].log_softmax(-1)
        means.append((without_memory.exp() * (without_memory - with_memory)).sum(-1).mean().item())
    output = EpisodeModel(model, ObjectiveOptions(history_kl=0.5), write_chunk=chunk)(**batch)
    expected = sum(means) / len(means)
    assert abs(output["history_kl"].item() - expected) < LOSS_TOLERANCE < 0.01 * expected
    assert abs(output["loss"].item() - output["answer"].item() - 0.5 * expected) < LOSS_TOLERANCE


def test_unrelated_divergence_matches_the_equations():
    """By the equations: each exchange with the memory of its conversation, and with none; the mean of their means."""
    model = patched_model(state_heads=2)
    batch, means = with_unrelated(episode_batch()), []
    for row, columns in enumerate(([2, 3], [1])):
        history = batch["write_ids"][row][batch["write_mask"][row].bool()].tolist()
        exchange = batch["unrelated_ids"][row][batch["unrelated_mask"][row].bool()].tolist()
        reads = [False] * len(exchange)
        with_memory = naive_run(model, exchange, naive_run(model, history)[1], reads)[0].log_softmax(-1)
        without_memory = naive_run(model, exchange, writes=reads)[0].log_softmax(-1)
        means.append((without_memory.exp() * (without_memory - with_memory)).sum(-1)[columns].mean().item())
    output = EpisodeModel(model, ObjectiveOptions(unrelated_kl=0.5))(**batch)
    expected = sum(means) / len(means)
    assert abs(output["unrelated_kl"].item() - expected) < LOSS_TOLERANCE < 0.01 * expected
    assert abs(output["loss"].item() - output["answer"].item() - 0.5 * expected) < LOSS_TOLERANCE


def test_unrelated_divergence_can_be_reduced_by_training():
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


def test_a_step_in_micro_batches_equals_one_step():
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
