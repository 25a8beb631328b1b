"""A run evaluates, keeps its best weights, logs, and reports errors."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from data.spoken_facts import answer_in
from helpers.tiny import patched_model, write_jsonl
from safetensors.torch import load_file
from training.batches import episode_batch
from training.short_runs import changed, summary

from deltamem_tool import DeltaMemError
from deltamem_tool.adapter.config_file import PLOT_FILE, SUMMARY_FILE, WEIGHTS_FILE
from deltamem_tool.data import dialogues
from deltamem_tool.data.fact_words import is_held_out
from deltamem_tool.data.store import EncodedEpisodes
from deltamem_tool.errors import ConfigError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.recipe.load import DataOptions
from deltamem_tool.training import EpisodeModel, train
from deltamem_tool.training import trainer as engine
from deltamem_tool.training.run import run_data
from deltamem_tool.training.trainer import EpisodeSampler
from deltamem_tool.training.validation import batches_of, metrics, outcomes

pytestmark = pytest.mark.slow

PNG = b"\x89PNG\r\n\x1a\n"
LOSS_TOLERANCE = 1e-5


# Evaluation


def test_outcomes_match_each_conversation_run_alone():
    """Covers its own memory, none, and the next one's. An answer counts if all its tokens are the likeliest."""
    model, batch = patched_model(), episode_batch()
    step = EpisodeModel(model).eval()
    rows, results = batch["rows"].tolist(), metrics(outcomes(step, [batch]))
    expected = {}
    for suffix, source in (("", lambda row: row), ("_zero", lambda row: None), ("_donor", lambda row: 1 - row)):
        losses, right = [], []
        for exchange, row in enumerate(rows):
            of = source(row)
            with torch.no_grad():
                memory = adapter_of(model).empty_memory(1)
                if of is not None:
                    length = int(batch["write_mask"][of].sum())
                    memory = step.write(batch["write_ids"][of : of + 1, :length], None).memory
                ids = batch["read_ids"][exchange : exchange + 1, : int(batch["read_mask"][exchange].sum())]
                logits = step.answer(memory, ids, None, torch.arange(ids.shape[1])).log_softmax(-1)
            scored = [t for t, label in enumerate(batch["labels"][exchange].tolist()) if label >= 0]
            losses += [-logits[t - 1, ids[0, t]].item() for t in scored]
            right.append(all(logits[t - 1].argmax() == ids[0, t] for t in scored))
        expected[f"eval_loss{suffix}"] = sum(losses) / len(losses)
        expected[f"eval_recall{suffix}"] = sum(right) / len(right)
    assert results.keys() == expected.keys()
    assert all(abs(results[name] - value) < LOSS_TOLERANCE for name, value in expected.items())
    assert len({round(value, 4) for name, value in expected.items() if "loss" in name}) == 3


def test_an_answer_counts_if_its_tokens_are_the_likeliest():
    model, batch = patched_model(), episode_batch()
    step = EpisodeModel(model).eval()
    batch["targets"] = dict(step.views(batch))[""].argmax(-1)
    assert metrics(outcomes(step, [batch]))["eval_recall"] == 1.0
    batch["targets"][-1] = (batch["targets"][-1] + 1) % 96  # the one exchange of the second conversation
    assert abs(metrics(outcomes(step, [batch]))["eval_recall"] - 2 / 3) < 1e-9


@pytest.mark.parametrize(("count", "size", "sizes"), [(7, 3, [3, 4]), (6, 3, [3, 3]), (3, 1, [3]), (4, 1, [2, 2])])
def test_every_conversation_has_a_donor(count, size, sizes):
    groups = batches_of(range(count), size)
    assert [len(group) for group in groups] == sizes and [i for group in groups for i in group] == list(range(count))


def test_a_single_conversation_has_no_donor(recipe):
    with pytest.raises(ConfigError, match=r"(?s)at least two.*eval_episodes"):
        batches_of(range(1), 4)
    steps = []
    with pytest.raises(ConfigError, match=r"(?s)at least two.*eval_episodes"):
        train(changed(recipe, eval_episodes=1), report=lambda *said: steps.append(said))
    assert steps == []


def test_a_run_evaluates_and_keeps_its_best(recipe, monkeypatch):
    """The third evaluation is made to be the worst: the weights are those of the second."""
    real, calls, weights = engine.outcomes, [], []

    def worse(model, batches):
        calls.append(1)
        weights.append({name: weight.clone() for name, weight in model.adapter.state_dict().items()})
        factors = torch.tensor([10.0 if len(calls) == 3 else 1.0, 1.0, 1.0, 1.0])
        return {name: sums * factors for name, sums in real(model, batches).items()}

    monkeypatch.setattr(engine, "outcomes", worse)
    train(recipe)
    result, saved_weights = summary(recipe), load_file(f"{recipe.out}/{WEIGHTS_FILE}")
    evaluations = [row for row in result["log"] if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [2, 4, 6] and result["best_step"] == 4
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"] and evaluations[1].keys() >= {"eval_recall_donor"}
    assert all(torch.equal(saved_weights[name], weight) for name, weight in weights[1].items())
    assert not all(torch.equal(saved_weights[name], weight) for name, weight in weights[2].items())


def test_a_run_that_no_longer_improves_stops(recipe, monkeypatch):
    real = engine.outcomes
    monkeypatch.setattr(engine, "outcomes", lambda *args: {name: sums * 0 + 1 for name, sums in real(*args).items()})
    assert train(changed(recipe, steps=20, early_stop=2)).steps == 6


def test_evaluating_without_data_raises(recipe):
    with pytest.raises(ConfigError, match=r"eval_every needs conversations.*data.eval_path"):
        dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, eval_path=None))


def test_generated_dialogues_are_evaluated_on_held_out_facts(recipe, tokenizer):
    generated = dataclasses.replace(recipe, data=DataOptions(facts_first=1, facts_last=2))
    data = run_data(changed(generated, steps=2), tokenizer, "token", 1)
    held_out = {fact.answer for split in dialogues.SPLITS.values() for fact in split[True]}

    def answers(episodes):
        return {exchange[-1]["content"] for episode in episodes for exchange in episode.exchanges}

    assert len(data.validation) == 6 and answers(data.validation) <= held_out
    assert not answers(data.training[i] for i in range(len(data.training))) & held_out


def test_generated_facts_are_evaluated_on_held_out_words_at_full_size(recipe, tokenizer):
    options = {
        "facts_first": 1,
        "facts_last": 4,
        "fewest": 1.0,
        "chats_last": 0.0,
        "chats_until": 0.0,
        "third_person": 0.0,
    }
    data = run_data(
        changed(dataclasses.replace(recipe, data=DataOptions(generated="facts", **options)), steps=2),
        tokenizer,
        "token",
        1,
    )
    training = [data.training[i] for i in range(len(data.training))]
    assert len(training) == 8 and len(data.validation) == 6
    assert [len(episode.exchanges) for episode in training[:4]] == [1] * 4
    assert [len(episode.exchanges) for episode in data.validation] == [4] * 6
    for episodes, held_out in ((training, False), (data.validation, True)):
        answers = [answer_in(exchange[-1]["content"]) for episode in episodes for exchange in episode.exchanges]
        assert (
            {is_held_out(spoken.attribute) for spoken in answers}
            == {is_held_out(spoken.value) for spoken in answers}
            == {held_out}
        )


def test_generated_episodes_are_mixed_with_episodes_of_a_file(recipe, tokenizer):
    mixed = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, mix=0.25, generated="facts", max_read_tokens=400)
    )
    data = run_data(changed(mixed, steps=None, epochs=1.0), tokenizer, "token", 1)
    assert data.steps == 8 and len(data.training) == 32, "24 of the file are three of four"
    names = [data.training[i].where for i in range(32)]
    assert sum(name.startswith("generated") for name in names) == 8 and len(set(names)) == 32
    assert data.statistics["episodes"] == 24 and len(data.validation) == 6
    assert train(mixed).steps == 6


def test_an_exchange_that_is_too_long_raises_before_the_first_step(recipe, tokenizer):
    generated = dataclasses.replace(recipe, data=DataOptions(generated="facts", max_read_tokens=20))
    with pytest.raises(
        DeltaMemError, match=r"generated episode \d+: An exchange has \d+ tokens, more than max_read_tokens"
    ):
        run_data(generated, tokenizer, "token", 1)


def test_a_template_without_system_prompts_gets_none(recipe, tokenizer):
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    )
    chats = DataOptions(generated="facts", chats_first=1.0, chats_until=0.0)
    data = run_data(dataclasses.replace(recipe, data=chats), refusing, "token", 1)
    assert not any(message["role"] == "system" for i in range(24) for message in data.training[i].history)
    changed_recipe = dataclasses.replace(recipe, data=dataclasses.replace(chats, system="Be brief."))
    with pytest.raises(DeltaMemError, match="does not support a system prompt"):
        run_data(changed_recipe, refusing, "token", 1)


# Files written by a run


def test_the_summary_records_the_training_options(recipe, tmp_path):
    result = train(recipe)
    content = summary(recipe)
    assert content["steps"] == result.steps == 6 and content["parameters"] == result.parameters
    assert content["episodes"]["episodes"] == 24 and content["recipe"]["training.learning_rate"] == 1e-2
    assert {row["step"] for row in content["log"] if "loss" in row} == set(range(1, 7))
    assert all(0 < row["gates"] < 1 for row in content["log"] if "loss" in row)
    assert (tmp_path / "adapter" / PLOT_FILE).read_bytes().startswith(PNG)
    assert str(tmp_path) not in (tmp_path / "adapter" / SUMMARY_FILE).read_text(), "a path of this machine"
    assert set(content["versions"]) == {"deltamem", "torch", "transformers", "python"}


def test_logs_are_kept_after_the_run(recipe, tmp_path):
    train(changed(recipe, report_to=("tensorboard",)))
    assert any(path.name.startswith("events.") for path in (tmp_path / "adapter.logs").rglob("*"))


# The order of episodes


def test_episodes_of_similar_length_share_a_step(recipe):
    class Episodes:
        lengths = tuple(length for length in range(1, 41) for _ in range(5))

        def __len__(self):
            return len(self.lengths)

    def spread(order):
        chosen = list(EpisodeSampler(Episodes(), order, seed=0, batch_size=10))
        assert sorted(chosen) == list(range(200))
        batches = [[Episodes.lengths[i] for i in chosen[start : start + 10]] for start in range(0, 200, 10)]
        return sum(max(batch) - min(batch) for batch in batches) / len(batches)

    assert spread("by length") < 0.25 * spread("shuffled")
    assert list(EpisodeSampler(Episodes(), "as they come", seed=0)) == list(range(200))


def test_the_order_depends_only_on_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpisodeSampler(range(50), "shuffled", seed)
        sampler.set_epoch(epoch)
        torch.rand(3)  # what else was drawn does not matter
        return list(sampler)

    assert order(1, 0) == order(1, 0) and len({tuple(order(s, e)) for s, e in ((1, 0), (1, 1), (7, 0))}) == 3


def test_the_dataset_receives_the_epoch(recipe, monkeypatch):
    epochs = []
    monkeypatch.setattr(EncodedEpisodes, "set_epoch", lambda self, epoch: epochs.append(epoch))
    train(changed(recipe, steps=None, epochs=2.0, eval_every=None))
    assert sorted(set(epochs)) == [0, 1]


# Errors


def test_a_diverged_run_reports_step_rows_and_gates(recipe, monkeypatch, tmp_path):
    """The step, the rows of its batch, and the gates."""
    forward, calls = EpisodeModel.forward, []

    @functools.wraps(forward)  # the Trainer looks at the signature
    def diverging(self, **batch):
        calls.append(batch)
        output = forward(self, **batch)
        return {**output, "loss": output["loss"] * (float("nan") if len(calls) == 3 else 1)}

    monkeypatch.setattr(EpisodeModel, "forward", diverging)
    with pytest.raises(DeltaMemError) as error:
        train(changed(recipe, eval_every=None))
    assert "the loss of step 3 is nan" in error.value.what
    lines = [int(part.split(":")[1]) for part in error.value.why.split(";")[0].split(", ") if ".jsonl:" in part]
    assert len(lines) == 4 and set(lines) <= set(range(1, 25)) and "mean gate β by layer was 0." in error.value.why
    assert not (tmp_path / "adapter").exists()


def test_conversations_that_are_too_long_are_truncated_on_the_left(recipe, tmp_path):
    from deltamem_tool.data.dialogues import assistant, user

    long = [[user("a " * 60), assistant("b"), user("c"), assistant("d")]] * 4
    write_jsonl(tmp_path / "talks.jsonl", long)
    data = dataclasses.replace(recipe.data, max_write_tokens=20)
    train(changed(dataclasses.replace(recipe, data=data), steps=1))
    episodes = summary(recipe)["episodes"]
    assert episodes["cut"] == 4 and episodes["write_tokens"]["max"] == 20


def test_a_run_that_stops_before_its_first_log_has_a_loss(recipe, monkeypatch):
    """Of 1,000 steps every tenth is logged, and no evaluation is better than the first: it stops after the second."""
    real = engine.outcomes
    monkeypatch.setattr(engine, "outcomes", lambda *args: {name: sums * 0 + 1 for name, sums in real(*args).items()})
    result = train(changed(recipe, steps=1000, eval_every=2, early_stop=1))
    assert result.steps == 4
    assert [step for step, _ in result.losses] == [2, 4]
