"""Log-probabilities of answers match a plain loop over tokens, under every condition and batch size."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from evaluation.asked import history, reading
from helpers.tiny import CHAT_TEMPLATE, base_parameters, randomise, tiny_model, with_template

from deltamem_tool import DeltaMemConfig, MemoryCache, attach
from deltamem_tool.data import dialogues
from deltamem_tool.errors import DataError
from deltamem_tool.evaluation import likelihood
from deltamem_tool.evaluation.conditions import ALL, NOTHING, RETRIEVED, EvalProtocol
from deltamem_tool.evaluation.likelihood import scored_answers
from deltamem_tool.evaluation.prompts import Views
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.scoring.scales import LOG_PROB, TOKENS
from deltamem_tool.evaluation.subject import Subject
from deltamem_tool.evaluation.task import Item
from deltamem_tool.evaluation.write_pass import memorise
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.state import MemoryState

TOLERANCE = 2e-5  # nats: float32 in a padded batch with one call, and alone token by token
MEMORY = EvalProtocol.parse("memory")


def item(number: int, question: int = 0) -> Item:
    """An item; histories and answers have different lengths."""
    message = dialogues.user("Good to know." * (1 + question))
    answer = f"{('Rex', 'Bella', 'Fido')[number % 3]} is my dog." + " Got it." * question
    name = f"history {number}"
    return Item(
        f"{name}/{question}", name, history(number, 1 + number % 2), [message], [answer], "all", f"talks:{number}"
    )


def in_torch(memory):
    return MemoryState(
        {layer: torch.from_numpy(state) for layer, state in memory.states.items()},
        memory.adapter,
        {layer: torch.from_numpy(segment) for layer, segment in memory.open_segments.items()},
    )


def mean(memories):
    layers = memories[0].layers
    states = {layer: torch.stack([memory.layers[layer] for memory in memories]).mean(0) for layer in layers}
    return MemoryState(states, memories[0].adapter, memories[0].open_segments)


def swapped(memory):
    """The memory with its two layers exchanged: the only permutation of two."""
    first, second = memory.layers
    states = {first: memory.layers[second], second: memory.layers[first]}
    return MemoryState(states, memory.adapter, memory.open_segments)


class Likely:
    name = "likely"
    by_likelihood = True

    def __init__(self, items=None):
        self._items = items or [item(0), item(1, 1), item(2), item(2, 1)]

    def items(self):
        return self._items


@pytest.fixture(scope="module", params=["token", "message"])
def model(request, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4, granularity=request.param)))
    return model


@torch.no_grad()
def one_by_one(model, tokenizer, prompt, answer, memory=None):
    """The log-probabilities of the answer, each token computed from the beginning in its own cache."""
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    log_probs = []
    for token in tokenizer(answer, add_special_tokens=False).input_ids:
        kwargs = {} if memory is None else {"cache": MemoryCache(model, memory, write=False)}
        logits = model(torch.tensor([before]), **kwargs).logits[0, -1]
        log_probs.append(math.log(logits.double().softmax(0)[token]))
        before = [*before, token]
    return log_probs


def test_every_condition_matches_a_plain_loop(model, tokenizer):
    task = Likely()
    evaluation = evaluate(model, tokenizer, task, MEMORY, retrieved=True)
    base = tiny_model(vocab_size=len(tokenizer))
    subject = Subject.from_model(model, tokenizer)
    views = Views(subject, MEMORY, 0)
    donors = {"history 0": "history 1", "history 1": "history 2", "history 2": "history 0"}
    memories = {each.history_id: in_torch(memorise(subject, [each.history])) for each in task.items()}
    for record in evaluation.records:
        (question,) = [each for each in task.items() if each.id == record.item]
        others = [memory for name, memory in memories.items() if name != question.history_id]
        own = {
            "state": memories[question.history_id],
            "donor_state": memories[donors[question.history_id]],
            "mean_state": mean(others),
            "permuted_state": swapped(memories[question.history_id]),
            "zero_state": adapter_of(model).empty_memory(1),
        }.get(record.condition)
        view = {"full_context": ALL, "bm25": RETRIEVED}.get(record.condition, NOTHING)
        prompt = views.prompt(question, view)
        values = one_by_one(base if own is None else model, tokenizer, prompt, question.answers[0], own)
        assert record.scores[TOKENS] == len(values)
        assert record.scores[LOG_PROB] == pytest.approx(sum(values) / len(values), abs=TOLERANCE), record.condition
    means = {c.name: evaluation.estimate(LOG_PROB, c.name).mean for c in evaluation.conditions}
    assert means["zero_state"] == pytest.approx(means["no_adapter"], abs=TOLERANCE)
    assert all(abs(means["state"] - means[name]) > 100 * TOLERANCE for name in ("donor_state", "no_adapter"))
    assert abs(means["full_context"] - means["no_adapter"]) > 100 * TOLERANCE


def test_the_batch_size_changes_nothing(model, tokenizer, monkeypatch):
    whole = evaluate(model, tokenizer, Likely(), MEMORY)
    small = evaluate(model, tokenizer, Likely(), MEMORY, batch_size=2)
    monkeypatch.setattr(likelihood, "LOGITS", 1)  # one row at a time
    single = evaluate(model, tokenizer, Likely(), MEMORY)
    for one, two, three in zip(whole.records, small.records, single.records, strict=True):
        assert one.scores[LOG_PROB] == pytest.approx(two.scores[LOG_PROB], abs=TOLERANCE)
        assert one.scores[LOG_PROB] == pytest.approx(three.scores[LOG_PROB], abs=TOLERANCE)
    assert not any(parameter.requires_grad for parameter in base_parameters(model))


def test_the_mean_is_over_tokens(model, tokenizer):
    """Perplexity is usually reported this way: long answers count for more."""
    evaluation = evaluate(model, tokenizer, Likely(), MEMORY)
    records = [record for record in evaluation.records if record.condition == "state"]
    assert len({record.scores[TOKENS] for record in records}) > 1
    total = sum(record.scores[LOG_PROB] * record.scores[TOKENS] for record in records)
    mean = total / sum(record.scores[TOKENS] for record in records)
    assert evaluation.estimate(LOG_PROB, "state").mean == pytest.approx(mean)
    assert all(line.startswith("over") and line.endswith(" nats per token)") for line in evaluation.verdict())


def scored(tokenizer, question, view=NOTHING, positions=None):
    key = view, question.id
    prompt = Views(reading(tokenizer), MEMORY, 0).prompt(question, view)
    return prompt, scored_answers(reading(tokenizer, positions), {key: question}, {key: prompt})[key]


THOUGHT = CHAT_TEMPLATE.replace(
    "<|{{ message.role }}|>", "<|{{ message.role }}|>{% if message.role == 'assistant' %}(no thought){% endif %}"
)
SPACED = CHAT_TEMPLATE.replace("{{ message.content }}", " {{ message.content }}")
STRIPPED = CHAT_TEMPLATE.replace("message.content", "message.content | trim")


@pytest.mark.parametrize(
    ("template", "before", "own"),
    [
        (CHAT_TEMPLATE, "<|assistant|>", "Fido is my dog."),
        (THOUGHT, "<|assistant|>(no thought)", "Fido is my dog."),
        (SPACED, "<|assistant|>", " Fido is my dog."),  # one token, which holds the first word
        (STRIPPED, "<|assistant|>", "Fido is my dog."),
    ],
)
def test_only_tokens_of_the_answer_are_scored(tokenizer, template, before, own):
    """The text that the template writes before the answer and the end of the turn are not scored."""
    changed = with_template(tokenizer, template)
    prompt, answer = scored(changed, item(5))
    answer_ids = answer.ids[-answer.answer :]
    assert changed.decode(answer_ids) == own and changed.decode(answer.ids[: -answer.answer]).endswith(before)
    assert changed.decode(answer.ids).startswith(prompt)
    assert changed.eos_token_id not in answer_ids


def test_items_that_cannot_be_scored_are_named(tokenizer):
    question = item(7)
    reversing = "{% for message in messages | reverse %}" + CHAT_TEMPLATE.partition("%}")[2]
    with pytest.raises(DataError, match="talks:7: The chat template renders the prompt differently"):
        scored(with_template(tokenizer, reversing), question)
    with pytest.raises(DataError, match="talks:7 has no answer to score"):
        scored(tokenizer, replace(question, answers=[""]))
    length = len(scored(tokenizer, question, ALL)[1].ids)
    assert len(scored(tokenizer, question, ALL, length)[1].ids) == length
    with pytest.raises(DataError, match=f"talks:7 is too long for the model: {length} tokens in view with the answer"):
        scored(tokenizer, question, ALL, length - 1)


def test_logits_that_are_not_finite_raise(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    attach(model, DeltaMemConfig(rank=4))
    with torch.no_grad():
        model.lm_head.weight[0] = math.inf
    with pytest.raises(DataError, match=r"talks:.: the log-probability of the answer is not finite"):
        evaluate(model, tokenizer, Likely(), MEMORY, only=("no_adapter",))
