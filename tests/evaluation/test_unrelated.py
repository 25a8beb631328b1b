"""A memory must not change unrelated answers or the likelihood of unrelated texts."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from helpers.tiny import write_jsonl

from deltamem_tool import DeltaMemConfig
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.cli.evaluate import command
from deltamem_tool.data import dialogues
from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation import subject as subjects
from deltamem_tool.evaluation.conditions import EvalProtocol
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.scoring.scales import LOG_PROB
from deltamem_tool.evaluation.task import find_task
from deltamem_tool.evaluation.tasks.agreement import Agreement
from deltamem_tool.evaluation.tasks.text import Text
from deltamem_tool.evaluation.tasks.unrelated import unrelated_conversations

MEMORY = EvalProtocol.parse("memory")
QUESTIONS = "What is my dog's name?\n\n  Where do I live?  \nWhat is my name?\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of questions, and one of two conversations."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "questions.txt").write_text(QUESTIONS)
    talks = [
        [
            dialogues.user(f"My dog is {name}."),
            dialogues.assistant("Got it."),
            dialogues.user("Hello."),
            dialogues.assistant("Hi."),
        ]
        for name in ("Rex", "Bella")
    ]
    write_jsonl(folder / "talks.jsonl", talks)
    return {"data": str(folder / "questions.txt"), "history": str(folder / "talks.jsonl")}


def answers(evaluation, condition):
    return {record.item: record.answer for record in evaluation.records if record.condition == condition}


def scores(evaluation, condition, metric):
    return {record.item: record.scores[metric] for record in evaluation.records if record.condition == condition}


def test_an_answer_is_right_if_the_base_gives_it(model, tokenizer, files):
    task = Agreement(**files, start=1, new_tokens=6)
    evaluation = evaluate(model, tokenizer, task, MEMORY)
    base = answers(evaluation, "no_adapter")
    assert len(base) == 3
    for condition in evaluation.conditions:
        own = answers(evaluation, condition.name)
        same = {name: float(own[name] == base[name]) for name in base}
        same_start = {name: float(own[name].split()[:1] == base[name].split()[:1]) for name in base}
        assert (
            scores(evaluation, condition.name, "same") == same
            and scores(evaluation, condition.name, "same_start") == same_start
        )
    assert 0 in scores(evaluation, "state", "same").values()  # or the test would show no difference
    assert set(scores(evaluation, "zero_state", "same").values()) == {1.0}  # which changes nothing
    rights = {record.item: record.right for record in evaluation.records if record.condition == "state"}
    assert rights == {name: [answer] for name, answer in base.items()}
    some = evaluate(model, tokenizer, task, MEMORY, only=("state",))
    assert {condition.name for condition in some.conditions} == {"state", "no_adapter"}
    assert answers(some, "state") == answers(evaluation, "state")


def test_a_zero_state_that_is_written_to_can_differ(model, tokenizer, files):
    evaluation = evaluate(model, tokenizer, Agreement(**files, new_tokens=6), MEMORY, write=True)
    assert 0 in scores(evaluation, "zero_state", "same").values()


def test_no_facts_mean_an_empty_memory(model, tokenizer, files):
    task = Agreement(files["data"], facts=0, new_tokens=6)
    assert all(item.history == [] for item in task.items())
    evaluation = evaluate(model, tokenizer, task, MEMORY)
    assert set(scores(evaluation, "state", "same").values()) == {1.0}


def test_a_stopped_run_resumes_with_the_answers_of_the_base(model, tokenizer, files, tmp_path, monkeypatch):
    task = Agreement(**files, new_tokens=6)
    whole = evaluate(model, tokenizer, task, MEMORY)
    own = subjects.Subject.ask

    def stops(subject, prompts, memory, condition, new):
        if condition.name != "no_adapter":
            raise KeyboardInterrupt
        return own(subject, prompts, memory, condition, new)

    with monkeypatch.context() as patched:
        patched.setattr(subjects.Subject, "ask", stops)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, tokenizer, task, MEMORY, folder=tmp_path)
    on = evaluate(model, tokenizer, task, MEMORY, folder=tmp_path)
    assert on.records == whole.records and on.asked == len(whole.records) - 3


def test_questions_and_conversations_are_read(files):
    shipped = Agreement().items()
    assert len(shipped) == len({item.question[0]["content"] for item in shipped}) == 200
    assert len({item.history_id for item in shipped}) == 200 and all(item.history for item in shipped)
    assert Agreement(seed=1).items()[0].history != shipped[0].history == Agreement().items()[0].history
    mine = Agreement(**files).items()
    assert [item.question[0]["content"] for item in mine] == [line.strip() for line in QUESTIONS.split("\n") if line]
    assert [item.history_id for item in mine] == ["conversation 1", "conversation 2", "conversation 1"]
    assert "Rex" in str(mine[0].history) and mine[0].history == mine[2].history
    assert [item.where.rpartition(" ")[2] for item in mine] == ["1", "3", "4"]


def test_invalid_options_raise(files, tmp_path):
    for options, says in (
        ({"start": 0}, "words of the start"),
        ({"new_tokens": "many"}, "tokens of an answer"),
        ({"history": 3}, "The history of the task .* must be text"),
    ):
        with pytest.raises(ConfigError, match=says):
            find_task("agreement", {**files, **options})
    for facts in (-1, 1.5):
        with pytest.raises(ConfigError, match="facts of a conversation"):
            unrelated_conversations(3, facts, 0)
    both = {**files, "facts": 0}  # which would be ignored
    for name, options in (("agreement", {}), ("text", {"words": 2}), ("perplexity", {"data": files["history"]})):
        task = find_task(name, {**both, **options})
        with pytest.raises(ConfigError, match="facts and history cannot be combined"):
            task.items()
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("bytes.txt", "nowhere.txt"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            Agreement(str(tmp_path / name)).items()


def test_a_text_is_split_into_passages(tmp_path):
    words = [f"word{number}" for number in range(25)]
    (tmp_path / "text.txt").write_text(" ".join(words[:7]) + "\n\n" + "\n".join(words[7:]))
    items = Text(str(tmp_path / "text.txt"), words=10, facts=1).items()
    assert len(items) == 2 and len({item.history_id for item in items}) == 2
    for number, item in enumerate(items):
        first, second = words[10 * number : 10 * number + 5], words[10 * number + 5 : 10 * number + 10]
        assert item.question[0]["content"].endswith("\n\n" + " ".join(first)) and item.answers == [" ".join(second)]
    with pytest.raises(DataError, match=r"no passage of 30 words.*\n.*25"):
        Text(str(tmp_path / "text.txt"), words=30).items()
    with pytest.raises(ConfigError, match="words of a passage"):
        Text(str(tmp_path / "text.txt"), words=1)
    with pytest.raises(ConfigError, match="needs its data"):
        Text()


def test_an_empty_memory_gives_the_likelihood_of_the_base(model, tokenizer, tmp_path, files):
    (tmp_path / "text.txt").write_text("my dog is my cat and my cat is my dog " * 6)
    task = Text(str(tmp_path / "text.txt"), words=20, history=files["history"])
    evaluation = evaluate(model, tokenizer, task, MEMORY)
    means = {condition.name: evaluation.estimate(LOG_PROB, condition.name).mean for condition in evaluation.conditions}
    assert means["zero_state"] == pytest.approx(means["no_adapter"], abs=1e-6) != means["state"]
    written = evaluate(model, tokenizer, task, MEMORY, write=True)
    assert written.estimate(LOG_PROB, "zero_state").mean != pytest.approx(means["no_adapter"], abs=1e-3)
    assert written.estimate(LOG_PROB, "no_adapter").mean == means["no_adapter"]


def test_the_eval_commands_for_unrelated_texts(tmp_path, checkpoint, files):
    create_adapter(str(checkpoint), DeltaMemConfig(rank=4), tmp_path / "adapter")
    (tmp_path / "text.txt").write_text("my dog is my cat and my cat is my dog " * 6)
    shared = [str(tmp_path / "adapter"), "--set", f"history={files['history']}", "--margin", "0.1", "--write", "--json"]
    for options in (
        ["--task", "agreement", "--data", files["data"], "--set", "new_tokens=4", "--conditions", "zero_state"],
        ["--task", "text", "--data", str(tmp_path / "text.txt"), "--set", "words=20"],
    ):
        answer = CliRunner().invoke(command, [*shared, *options])
        assert answer.exit_code == 0, answer.output
        report = json.loads(answer.stdout)
        assert report["differences"]["no_adapter"]["mean"] == 0.0  # a fresh adapter changes nothing
        assert report["run"]["options"]["write"] is True and report["margin"] == 0.1
