"""The task `perplexity`: which turns are scored after which history, and how its figures are shown."""

from __future__ import annotations

import copy
import io
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from click.testing import CliRunner
from evaluation.asked import reading
from evaluation.published import TALK
from evaluation.reported import write_records
from helpers.tiny import randomise, tiny_model, write_jsonl
from rich.console import Console

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.cli.evaluate import command
from deltamem_tool.data import dialogues
from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation.conditions import ALL, NOTHING, EvalProtocol, conditions_of
from deltamem_tool.evaluation.prompts import Views
from deltamem_tool.evaluation.records import RECORDS_FILE, Record
from deltamem_tool.evaluation.report.compare import compare
from deltamem_tool.evaluation.report.evaluation_file import evaluation_json, read_evaluation
from deltamem_tool.evaluation.report.tables import plot_scores, score_table
from deltamem_tool.evaluation.result import Evaluation
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.scoring.digits import decimals, mean_and_interval, number_text, plus_minus, signed_text
from deltamem_tool.evaluation.scoring.scales import LOG_PROB, TOKENS, scale_of
from deltamem_tool.evaluation.scoring.statistics import Difference, difference, estimate, verdict
from deltamem_tool.evaluation.task import find_task

USER, ASSISTANT = dialogues.user, dialogues.assistant
SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [[USER(f"Question {n}"), ASSISTANT(f"Answer {n}")] for n in range(4)]
TALKS = [[message for turn in TURNS for message in turn], [SYSTEM, *TURNS[0], *TURNS[1], *TURNS[2]]]


@pytest.fixture
def talks(tmp_path):
    return str(write_jsonl(tmp_path / "talks.jsonl", TALKS))


def test_the_last_answer_is_scored_after_all_earlier_turns(talks):
    first, second = find_task("perplexity", {"data": talks}).items()
    assert list(first.history) == [TALKS[0][:-2]] and list(first.question) == TURNS[3][:1]
    assert list(first.answers) == ["Answer 3"] and first.group == "last turn"
    assert list(second.history) == [TALKS[1][:-2]] and list(second.question) == [SYSTEM, TURNS[2][0]]
    assert second.where.endswith("talks.jsonl:2, message 7") and second.query == "Question 2"


def test_several_turns_share_one_history(talks):
    """All share the memory, and each sees the turns between the history and itself."""
    items = find_task("perplexity", {"data": talks, "turns": 2}).items()
    first, second, third, fourth = items
    assert first.history == second.history == [TALKS[0][:4]] and first.history_id == second.history_id
    assert list(second.question) == [*TURNS[2], TURNS[3][0]] and list(second.answers) == ["Answer 3"]
    assert [each.group for each in items] == ["turn 1 of 2", "turn 2 of 2"] * 2
    assert third.history == fourth.history == [TALKS[1][:3]] and third.history_id != first.history_id
    assert list(fourth.question) == [SYSTEM, *TURNS[1], TURNS[2][0]]
    assert len({each.id for each in items}) == 4


def test_a_system_prompt_is_in_view_once_and_first(talks, tokenizer):
    second = find_task("perplexity", {"data": talks}).items()[1]
    views = Views(reading(tokenizer), EvalProtocol.parse("window:1000"), 0)
    for view in (NOTHING, ALL, "window"):
        text = views.prompt(second, view)
        assert text.startswith("<|system|>Be kind.<|end|><|user|>") and text.count("<|system|>") == 1
        assert ("Question 0" in text) == (view != NOTHING)


def test_sessions_of_locomo_are_kept(tmp_path):
    last = [{"speaker": "Ann", "text": "Hi!"}, {"speaker": "Ben", "text": "Hello."}, {"speaker": "Ann", "text": "Bye."}]
    talk = {**TALK, "conversation": {**TALK["conversation"], "session_10": last}}
    (tmp_path / "locomo.json").write_text(json.dumps([talk]))
    (item,) = find_task("perplexity", {"data": str(tmp_path / "locomo.json")}).items()
    assert item.history_id == "talk-7" and len(item.history) == 2  # the third is scored
    assert item.question[-1]["content"].endswith("Ann: Hi!") and item.answers[0].endswith("Ben: Hello.")
    assert item.where.endswith("locomo.json conversation 1, message 2")
    for option in ({"split": "test"}, {"revision": "v1"}):
        with pytest.raises(DataError, match=r"locomo\.json has no split and no revision"):
            find_task("perplexity", {"data": str(tmp_path / "locomo.json"), **option}).items()


@pytest.mark.parametrize(
    ("options", "talk", "says"),
    [
        ({}, TURNS[0], "talks.jsonl:1 has no history"),
        ({"turns": 2}, [*TURNS[0], *TURNS[1]], "talks.jsonl:1 has too few turns"),
        ({"turns": 1}, [*TURNS[0], USER("And?"), ASSISTANT(" \n")], "talks.jsonl:1, message 4 is empty"),
    ],
)
def test_a_conversation_that_cannot_be_scored_is_named(tmp_path, options, talk, says):
    file = write_jsonl(tmp_path / "talks.jsonl", [talk])
    with pytest.raises(DataError, match=says):
        find_task("perplexity", {"data": str(file), **options}).items()


def test_template_options_of_a_row_apply_to_every_text(tmp_path, tokenizer):
    """The written, visible and scored texts equal those of a template with the option built in."""
    rows = [{"messages": talk, "chat_template_kwargs": {"mood": "calm"}} for talk in TALKS]
    (tmp_path / "given.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = write_jsonl(tmp_path / "plain.jsonl", TALKS)
    model = tiny_model(vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4)))
    texts = {}
    for name, path in (("{{ mood }}", tmp_path / "given.jsonl"), ("calm", plain), ("", plain)):
        other = copy.deepcopy(tokenizer)
        other.chat_template = name + tokenizer.chat_template
        result = evaluate(model, other, find_task("perplexity", {"data": str(path)}), EvalProtocol.parse("memory"))
        texts[name] = [
            (record.item, record.condition, record.prompt_tokens, record.scores) for record in result.records
        ]
    assert texts["{{ mood }}"] == texts["calm"] != texts[""]


def test_invalid_options_raise():
    with pytest.raises(ConfigError, match="The task perplexity needs its data"):
        find_task("perplexity", {})
    for turns in (0, "2", 1.5):
        with pytest.raises(ConfigError, match="must be 1 or more"):
            find_task("perplexity", {"data": "talks.jsonl", "turns": turns})


SCALE = scale_of(LOG_PROB)
ALONE = [str(number) for number in range(40)]


def test_an_open_ended_scale_clips_nothing():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(-3, 0.5, 40), rng.normal(-6, 0.5, 40)
    interval = estimate(list(ours), ALONE, 0, SCALE)
    normal = 1.96 * ours.std(ddof=1) / math.sqrt(40)
    assert interval.mean == pytest.approx(ours.mean()) and interval.high < -2
    assert interval.low == pytest.approx(interval.mean - normal, abs=0.03)
    apart = difference(list(ours), list(theirs), ALONE, 0, SCALE)
    assert apart.mean == pytest.approx(3, abs=0.3) and 2 < apart.low < apart.mean < apart.high < 4
    assert estimate([-1e-9] * 20 + [-0.4] * 20, ALONE, 0, SCALE).high <= 0  # no probability is above 1
    same = estimate([-0.5] * 40, ALONE, 0, SCALE)  # the rule of three is about shares
    assert (same.mean, same.low, same.high) == (-0.5, -0.5, -0.5)


def test_weighting_by_tokens_equals_one_question_per_token():
    rng = np.random.default_rng(1)
    means, counts = rng.normal(-2, 1, 40).clip(-5, -0.1), rng.integers(1, 9, 40)
    tokens = [(mean, str(n)) for n, (mean, count) in enumerate(zip(means, counts, strict=True)) for _ in range(count)]
    apart = estimate([mean for mean, _ in tokens], [cluster for _, cluster in tokens], 0, SCALE)
    together = estimate(list(means), ALONE, 0, SCALE, list(map(float, counts)))
    assert together.mean == pytest.approx(apart.mean)
    assert (together.low, together.high) == pytest.approx((apart.low, apart.high))
    zeros = [0.0] * 40
    differs = difference(list(means), zeros, ALONE, 0, SCALE, list(map(float, counts)))
    assert differs.mean == pytest.approx(apart.mean) and differs.p_value < 0.001


def test_the_verdict_in_nats_per_token():
    clear = Difference(0.21, 0.17, 0.25, 0.001, 40)
    assert verdict("donor state", clear, SCALE.unit) == "the state adds 0.21 ± 0.04 nats per token over donor state"
    unclear = Difference(-0.01, -0.03, 0.01, 0.4, 40)
    assert verdict("zero state", unclear, SCALE.unit).endswith("(-0.01 ± 0.02 nats per token)")
    sure = Difference(0.1234, 0.1192, 0.1271, 0.001, 40)
    assert verdict("donor state", sure, SCALE.unit) == "the state adds 0.1234 ± 0.0042 nats per token over donor state"
    assert mean_and_interval(0.2, 0.1, 0.25) == ("0.20", "0.10–0.25")
    assert mean_and_interval(-0.0001, -0.1, -0.0001) == ("0.00", "-0.10 to 0.00")


def test_digits_follow_the_half_width_of_the_interval():
    """Two digits, or more for a narrower interval; none for an interval that is only rounding."""
    for half, after in ((0.5, 2), (0.01, 2), (0.0099, 4), (0.001, 4), (0.0009, 5), (2e-6, 7), (1e-9, 2), (0.0, 2)):
        assert decimals(1.0, 1.0 - half, 1.0) == after, half
    assert plus_minus(-1.5, -1.5021, -1.4999) == "-1.5000 ± 0.0021"
    assert [signed_text(0.00312, 4), signed_text(-0.00001, 4), signed_text(-0.2)] == ["+0.0031", "0.0000", "−0.20"]
    assert number_text(-0.00312, 4) == "−0.0031"


def found() -> Evaluation:
    conditions = conditions_of(EvalProtocol.parse("memory"))
    better = {"state": 1.0}
    records = [
        Record(
            f"{n}", f"{n}", f"turn {1 + n % 2} of 2", c.name, "?", "", ["b"],
            {LOG_PROB: better.get(c.name, 0.0) - 2.0 - 0.01 * n, TOKENS: 1.0 + n}, 5,
        )
        for c in conditions
        for n in range(8)
    ]  # fmt: skip
    return Evaluation("perplexity", "memory", [LOG_PROB], conditions, ["turn 1 of 2", "turn 2 of 2"], records, 0)


def test_the_score_is_also_shown_as_perplexity(tmp_path):
    mean = sum((-1.0 - 0.01 * n) * (1 + n) for n in range(0, 8, 2)) / sum(1 + n for n in range(0, 8, 2))
    console = Console(width=120, file=io.StringIO())
    console.print(score_table(found()))
    text = console.file.getvalue()
    assert f"{mean:.2f}" in text and f"perplexity {math.exp(-mean):.2f}" in text
    evaluation = evaluation_json(found(), "f" * 64, ["--task", "perplexity"])
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert read_evaluation(tmp_path / "evaluation.json") == evaluation
    assert evaluation["scores"]["state"][0][0] == pytest.approx(mean)
    assert evaluation["differences"]["donor_state"]["mean"] == pytest.approx(1.0)
    mean, low, high = evaluation["overall"]["state"]
    assert evaluation["other_metrics"]["perplexity"]["state"] == pytest.approx(
        [math.exp(-mean), math.exp(-high), math.exp(-low)]
    )
    assert "the state adds 1.00 ± 0.00 nats per token over donor state" in evaluation["verdict"]
    plot_scores(found(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_two_perplexity_evaluations_are_compared_by_token(tmp_path):
    worse = found()
    for record in worse.records:  # more for longer answers
        record.scores[LOG_PROB] -= 0.1 * record.scores[TOKENS]
    folders = [write_records(tmp_path / name, each) for name, each in (("a", found()), ("b", worse))]
    compared = compare(*folders)
    assert not compared.unpaired
    (row,) = [row for row in compared.overall if row.condition == "state"]
    lengths = [1.0 + n for n in range(8)]
    assert row.mean == pytest.approx(-0.1 * sum(n * n for n in lengths) / sum(lengths))
    assert any(
        line.startswith("state: B is 0.57") and "nats per token lower than A" in line for line in compared.verdict()
    )


def test_records_without_token_counts_are_ignored(tmp_path):
    """If records lack token counts, the mean over tokens is that of the others."""
    whole, lines = write_records(tmp_path / "a", found()), found().records
    for name, empty in (("all", range(8)), ("one", [3])):
        folder = write_records(tmp_path / name, found())
        for n, record in enumerate(lines):
            record.scores[TOKENS] = 0.0 if n % 8 in empty else 1.0 + n % 8
        (folder / RECORDS_FILE).write_text("".join(json.dumps(asdict(record)) + "\n" for record in lines))
        compared = compare(whole, folder)
        assert "do not match evaluation.json" in compared.unpaired and compared.overall[0].p_value is None


def test_memories_can_come_from_other_conversations(talks, tmp_path):
    """The context and the scored turns are unchanged, and each conversation has one memory."""
    own = find_task("perplexity", {"data": talks, "turns": 2}).items()
    (tmp_path / "others.jsonl").write_text(
        json.dumps({"history": "My cat is Tom.", "prompt": "Hi.", "response": "Hello."})
    )
    for options, holds in (
        ({"facts": 0}, lambda history: history == []),
        ({"facts": 2}, lambda history: len(history) == 1 and len(history[0]) >= 2),
        ({"history": str(tmp_path / "others.jsonl")}, lambda history: "Tom" in str(history)),
    ):
        items = find_task("perplexity", {"data": talks, "turns": 2, **options}).items()
        assert [replace(item, history=one.history) for item, one in zip(items, own, strict=True)] == own
        assert all(holds(item.history) for item in items)
        assert all(items[number].history == items[number + 1].history for number in (0, 2))


def test_the_eval_command_runs_the_perplexity_task(tmp_path, checkpoint, talks):
    adapter = tmp_path / "adapter"
    create_adapter(str(checkpoint), DeltaMemConfig(rank=4), adapter)
    options = [str(adapter), "--task", "perplexity", "--data", talks, "--set", "turns=2", "--json"]
    for _ in range(2):  # the second time, no question is left
        report = json.loads(CliRunner().invoke(command, [*options, "--records", str(tmp_path / "records")]).stdout)
    assert report["metric"] == LOG_PROB and report["groups"] == ["turn 1 of 2", "turn 2 of 2"]
    assert report["questions"] == [2, 2] and all(score < 0 for score, _, _ in report["overall"].values())
    assert report["differences"]["zero_state"]["mean"] == 0.0  # a fresh adapter corrects nothing
    assert len((tmp_path / "records" / "records.jsonl").read_text().splitlines()) == 4 * len(report["conditions"])
