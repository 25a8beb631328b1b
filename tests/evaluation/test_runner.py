"""Every condition is what its name says, whatever the batch size, and a stopped run resumes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation.asked import Asked, answers, item
from helpers.tiny import base_parameters, randomise, tiny_model

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation import runner
from deltamem_tool.evaluation import subject as subjects
from deltamem_tool.evaluation.conditions import EvalProtocol, conditions_of
from deltamem_tool.evaluation.records import RECORDS_FILE, SETTINGS_FILE
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.segments.template import render

MEMORY = EvalProtocol.parse("memory")


@pytest.fixture(scope="module")
def task():
    """Two questions about each of three histories, one of them longer."""
    return Asked([item(number, question, sessions=1 + number % 2) for number in range(3) for question in range(2)])


def plain(tokenizer, task, context, name="qwen3"):
    """The answers of the same base without a memory, one question at a time."""
    base, answers = tiny_model(name, vocab_size=len(tokenizer)), []
    for each in task.items():
        history = [message for session in each.history for message in session] if context else []
        ids = tokenizer(render(tokenizer, [*history, *each.question], True), return_tensors="pt").input_ids
        output = base.generate(ids, max_new_tokens=task.max_new_tokens, do_sample=False)
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


def test_conditions_match_plain_generation(model, tokenizer, task):
    evaluation = evaluate(model, tokenizer, task, MEMORY)
    without = plain(tokenizer, task, context=False)
    for condition in ("zero_state", "scale_zero", "no_adapter"):
        assert answers(evaluation, condition) == without, condition
    assert answers(evaluation, "full_context") == plain(tokenizer, task, context=True) != without
    own, donated = answers(evaluation, "state"), answers(evaluation, "donor_state")
    assert own != donated and own != without
    moved = Asked([items for items in (*task.items()[2:], *task.items()[:2])])
    assert answers(evaluate(model, tokenizer, moved, MEMORY, only=("state",)), "state") == [*own[2:], *own[:2]]


def test_an_invalid_seed_raises_before_anything_is_asked(model, tokenizer, task, tmp_path):
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match=f"seed is {seed}"):
            evaluate(model, tokenizer, task, MEMORY, seed=seed, folder=tmp_path / "records")
    assert not list(tmp_path.iterdir())


def test_the_donor_is_the_next_history(model, tokenizer, task, monkeypatch):
    """Both questions get the memory of the next history."""
    memories = {}
    own = subjects.Subject.ask

    def watch(subject, prompts, memory, condition, new):
        memories[condition.name] = memory
        return own(subject, prompts, memory, condition, new)

    monkeypatch.setattr(subjects.Subject, "ask", watch)
    items = [item(number) for number in range(3)]  # prompts have one length, so the order of the items is kept
    evaluate(model, tokenizer, Asked(items), MEMORY)
    for layer, state in memories["donor_state"].states.items():
        assert np.array_equal(state, memories["state"].states[layer][[1, 2, 0]])
    with pytest.raises(DataError, match="1 history is too few"):
        evaluate(model, tokenizer, Asked([item(1, 0), item(1, 1)]), MEMORY)


def test_a_limit_drops_questions_but_not_donors(model, tokenizer, task):
    """The first two questions are about one history. Its donor is the next one, about which no question remains."""
    some = evaluate(model, tokenizer, task, MEMORY, limit=2)
    whole = evaluate(model, tokenizer, task, MEMORY)
    assert len(some.records) == 2 * len(some.conditions)
    assert some.records == [record for record in whole.records if record.history == "history 0"]


@pytest.mark.parametrize("protocol", ["memory", "window:20", "full"])
def test_the_batch_size_changes_nothing(model, tokenizer, task, protocol):
    chosen = EvalProtocol.parse(protocol)
    whole = evaluate(model, tokenizer, task, chosen, retrieved=True)
    small = evaluate(model, tokenizer, task, chosen, retrieved=True, batch_size=2)
    assert whole.records == small.records
    assert {condition.name for condition in whole.conditions} == {c.name for c in conditions_of(chosen, True)}


def test_controls_leave_the_model_unchanged(model, tokenizer, task):
    before = {name: weight.clone() for name, weight in adapter_of(model).state_dict().items()}
    first = evaluate(model, tokenizer, task, MEMORY)
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_of(model).state_dict().items())
    assert evaluate(model, tokenizer, task, MEMORY).records == first.records
    assert not any(parameter.requires_grad for parameter in base_parameters(model))


@pytest.mark.parametrize("condition", ["no_adapter", "scale_zero"])
def test_a_failed_control_leaves_the_model_unchanged(model, tokenizer, task, condition, monkeypatch):
    before = adapter_of(model).fingerprint
    with monkeypatch.context() as patched:
        patched.setattr(subjects, "answer_prompts", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(model, tokenizer, task, MEMORY, only=(condition,))
    assert adapter_of(model).fingerprint == before


def test_a_stopped_run_resumes(model, tokenizer, task, tmp_path, monkeypatch):
    whole = evaluate(model, tokenizer, task, MEMORY, batch_size=2)
    own, requests = subjects.Subject.ask, []

    def stops(subject, prompts, *rest):
        if len(requests) == 5:
            raise KeyboardInterrupt
        requests.append(len(prompts))
        return own(subject, prompts, *rest)

    options = {"batch_size": 2, "folder": tmp_path / "run", "settings": {"adapter": "a"}}
    with monkeypatch.context() as patched:
        patched.setattr(subjects.Subject, "ask", stops)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, tokenizer, task, MEMORY, **options)
    with (tmp_path / "run" / RECORDS_FILE).open("ab") as file:
        file.write(b'{"item": "cut in the mid')
    requests.clear()
    monkeypatch.setattr(subjects.Subject, "ask", lambda *inputs: requests.append(len(inputs[1])) or own(*inputs))
    assert evaluate(model, tokenizer, task, MEMORY, **options).records == whole.records
    assert sum(requests) == len(whole.records) - 10
    lines = (tmp_path / "run" / RECORDS_FILE).read_text().splitlines()
    assert len(lines) == len(whole.records) and all(json.loads(line)["right"] for line in lines)
    requests.clear()
    monkeypatch.setattr(runner, "memorise", lambda *_: pytest.fail("nothing is left to be asked"))
    assert evaluate(model, tokenizer, task, MEMORY, **options).records == whole.records and not requests


def test_a_folder_of_another_run_raises(model, tokenizer, task, tmp_path):
    evaluate(model, tokenizer, task, MEMORY, only=("state",), folder=tmp_path, settings={"adapter": "a"})
    for protocol, settings, differs in (
        (MEMORY, {"adapter": "b"}, "adapter"),
        (EvalProtocol.parse("full"), {"adapter": "a"}, "protocol"),
    ):
        with pytest.raises(DataError, match=differs):
            evaluate(model, tokenizer, task, protocol, folder=tmp_path, settings=settings)
    (tmp_path / RECORDS_FILE).write_text('{"item": "no more"}\n')
    with pytest.raises(DataError, match="line 1 is not a record"):
        evaluate(model, tokenizer, task, MEMORY, folder=tmp_path, settings={"adapter": "a"})


def test_a_margin_is_recorded_before_the_run(model, tokenizer, task, tmp_path, monkeypatch):
    """A run that stops after its first answers has a margin, and cannot be continued with another one."""
    own = subjects.Subject.ask

    def stops(*inputs):
        if (tmp_path / SETTINGS_FILE).exists():
            raise KeyboardInterrupt
        return own(*inputs)

    with monkeypatch.context() as patched:
        patched.setattr(subjects.Subject, "ask", stops)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, tokenizer, task, MEMORY, margin=0.25, folder=tmp_path, batch_size=2)
    assert json.loads((tmp_path / SETTINGS_FILE).read_text())["margin"] == 0.25
    assert evaluate(model, tokenizer, task, MEMORY, margin=0.25, folder=tmp_path).margin == 0.25
    for other in (None, 0.1):
        with pytest.raises(DataError, match="Its margin differ"):
            evaluate(model, tokenizer, task, MEMORY, margin=other, folder=tmp_path)
    with pytest.raises(ConfigError, match="Invalid margin: -1"):
        evaluate(model, tokenizer, task, MEMORY, margin=-1)


def test_a_changed_question_invalidates_the_records(model, tokenizer, task, tmp_path):
    evaluate(model, tokenizer, task, MEMORY, only=("state",), folder=tmp_path)
    first, *rest = task.items()
    changed = Asked([replace(first, answers=["other"]), *rest])
    with pytest.raises(DataError, match="items differ"):
        evaluate(model, tokenizer, changed, MEMORY, only=("state",), folder=tmp_path)
    for damaged in ("{", "[]"):
        (tmp_path / SETTINGS_FILE).write_text(damaged)
        with pytest.raises(DataError, match="damaged"):
            evaluate(model, tokenizer, task, MEMORY, only=("state",), folder=tmp_path)
    (tmp_path / SETTINGS_FILE).unlink()
    with pytest.raises(DataError, match="unknown evaluation"):
        evaluate(model, tokenizer, task, MEMORY, only=("state",), folder=tmp_path)


def test_a_changed_donor_invalidates_the_records(model, tokenizer, task, tmp_path):
    """With this limit, no question is about the donor, but its memory is the control."""
    first, second, third, *rest = task.items()
    assert first.history_id == second.history_id != third.history_id
    evaluate(model, tokenizer, task, MEMORY, only=("donor_state",), limit=1, folder=tmp_path)
    changed = [replace(one, history=first.history) for one in (third, *rest) if one.history_id == third.history_id]
    others = [one for one in rest if one.history_id != third.history_id]
    with pytest.raises(DataError, match="items differ"):
        evaluate(model, tokenizer, Asked([first, second, *changed, *others]), MEMORY, limit=1, folder=tmp_path)


def test_duplicate_names_raise(model, tokenizer, task):
    first, second, *rest = task.items()
    for twin, name in (
        (replace(second, id=first.id), first.id),
        (replace(rest[0], history_id=first.history_id), "history 0"),
    ):
        with pytest.raises(DataError, match=f"the same name, {name!r}"):
            evaluate(model, tokenizer, Asked([first, twin, *rest[1:]]), MEMORY)


def test_only_histories_with_questions_are_written(model, tokenizer, task, monkeypatch):
    own, written = runner.memorise, []
    monkeypatch.setattr(runner, "memorise", lambda *args: written.append(len(args[1])) or own(*args))
    evaluate(model, tokenizer, task, MEMORY, only=("zero_state", "no_adapter", "full_context"))
    assert not written
    evaluate(model, tokenizer, task, MEMORY, only=("donor_state",))
    assert written == [3]
    with pytest.raises(ConfigError, match="no condition 'donor'"):
        evaluate(model, tokenizer, task, MEMORY, only=("donor",))


def test_a_tokenizer_without_a_padding_token_works(model, tokenizer, task):
    expected = evaluate(model, tokenizer, task, MEMORY).records
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert bare.pad_token_id is None and evaluate(model, bare, task, MEMORY).records == expected


def test_an_item_that_is_too_long_is_named_before_anything_is_asked(tokenizer, monkeypatch, tmp_path):
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=128)
    attach(model, DeltaMemConfig(rank=4))
    long = [item(1), item(2, sessions=9)]
    monkeypatch.setattr(subjects.Subject, "ask", lambda *_: pytest.fail("asked"))
    with pytest.raises(DataError, match=r"talks:2 is too long for the model: .* tokens"):
        evaluate(model, tokenizer, Asked(long), MEMORY)
    first, second = long
    session = [message for each in second.history for message in each]
    unwritable = [first, replace(second, history=[session])]
    with pytest.raises(DataError, match=r"talks:2: session 1 of its history is too long for the model: .* tokens"):
        evaluate(model, tokenizer, Asked(unwritable), MEMORY, only=("state",), folder=tmp_path / "records")
    answer_alone = [first, replace(second, history=first.history, new_tokens=128)]
    with pytest.raises(DataError, match=r"(?s)talks:2 is too long for the model: .* 128 of them"):
        evaluate(model, tokenizer, Asked(answer_alone), MEMORY, only=("state",), folder=tmp_path / "records")
    assert not (tmp_path / "records").exists()  # a run without questions writes nothing


def test_an_item_can_limit_the_length_of_its_answer(model, tokenizer, task):
    """The answer equals that of a task with this limit for all items. The other answers are unchanged."""
    short = Asked(task.items())
    short.max_new_tokens = 2
    mixed = Asked([replace(each, new_tokens=2 if number % 2 else None) for number, each in enumerate(task.items())])
    long, brief = (answers(evaluate(model, tokenizer, one, MEMORY), "state") for one in (task, short))
    assert long != brief
    expected = [(brief if number % 2 else long)[number] for number in range(len(long))]
    assert answers(evaluate(model, tokenizer, mixed, MEMORY), "state") == expected


class Counted(Asked):
    """A task with known scores, since the answer is the name of the condition."""

    def score(self, item, answer):
        right = {"state": 30, "full_context": 40}.get(answer, 0)
        return {"exact": float(int(item.answers[0]) < right), "f1": 0.0}


def test_scores_are_counted_by_condition_and_group(model, tokenizer, monkeypatch):
    items = [item(number, group="even" if number % 2 == 0 else "odd") for number in range(40)]
    monkeypatch.setattr(subjects.Subject, "ask", lambda *inputs: [inputs[3].name] * len(inputs[1]))
    evaluation = evaluate(model, tokenizer, Counted(items), MEMORY, seed=1)
    assert evaluation.groups == ["even", "odd"]
    assert evaluation.estimate("exact", "state").mean == 0.75 and evaluation.estimate("exact", "zero_state").mean == 0
    assert evaluation.estimate("exact", "state", "even").mean == 0.75 and evaluation.estimate("f1", "state").mean == 0
    over = evaluation.difference("exact", "donor_state")
    assert over.mean == 0.75 and over.low > 0.55 and over.p_value < 0.001
    verdict = evaluation.verdict()
    assert any(line.startswith("the state adds 0.75 ± 0.1") and line.endswith("over donor state") for line in verdict)
    assert any(line.startswith("the state costs 0.25 ± 0.1") and line.endswith("over full context") for line in verdict)


def test_a_hybrid_model_is_evaluated(tokenizer, task):
    """The model's convolutions keep more than keys and values."""
    model = tiny_model("lfm2", vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4)))
    evaluation = evaluate(model, tokenizer, task, MEMORY)
    without = plain(tokenizer, task, context=False, name="lfm2")
    for condition in ("zero_state", "scale_zero", "no_adapter"):
        assert answers(evaluation, condition) == without, condition
    assert answers(evaluation, "full_context") == plain(tokenizer, task, context=True, name="lfm2")
    assert answers(evaluation, "state") != without
    single = evaluate(model, tokenizer, task, MEMORY, batch_size=1)
    assert [answers(single, name) for name in ("state", "donor_state")] == [
        answers(evaluation, name) for name in ("state", "donor_state")
    ]
