"""Data that a task cannot use: a three-line error, exit code 1, and nothing written."""

from __future__ import annotations

import json

import pytest
from evaluation.published import FACTS, QUESTION, SPLITS, TALK, row, write
from helpers.tiny import listing, save_checkpoint

from deltamem_tool import DeltaMemConfig
from deltamem_tool.adapter.create import create_adapter


@pytest.fixture
def run_eval(working_folder, deltamem, tokenizer):
    """Runs `deltamem eval` on a model with 512 positions, with an option for every file that it can write."""
    base = save_checkpoint(working_folder / "base", tokenizer)
    create_adapter(str(base), DeltaMemConfig(rank=4), "adapter")

    def run(task, data, *options):
        written = ["--records", "records", "--out", "found.json", "--plot", "found.png", "--json"]
        return deltamem("eval", "adapter", "--task", task, "--data", data, *options, *written)

    return run


def refused(working_folder, result, *words):
    result.assert_short_error(*words, code=1)
    assert len(result.err[result.err.index("Error: ") :].splitlines()) == 3  # below the progress bar
    assert not {"records/", "found.json", "found.png"} & listing(working_folder).keys()


def test_invalid_files_and_questions_give_a_short_error(working_folder, run_eval):
    write(working_folder / "cut.json", '[{"qa": ')
    refused(working_folder, run_eval("locomo", "cut.json"), "cut.json is not JSON", "char 8")
    rows = [QUESTION, {**QUESTION, "_id": "5a8c", "answer": ""}]
    write(working_folder / "hotpot.json", rows)
    refused(working_folder, run_eval("hotpotqa", "hotpot.json"), "hotpot.json question 2", "It has no answer.")
    facts = SPLITS["Conflict_Resolution"][0]
    write(working_folder / "facts.jsonl", json.dumps({**facts, "answers": [["nobody"], []]}) + "\n")
    refused(
        working_folder, run_eval("memoryagentbench", "facts.jsonl"), "facts.jsonl row 1 question 2", "It has no answer."
    )
    refused(working_folder, run_eval("memoryagentbench", "facts.jsonl", "--set", "sources=3"), "sources", "It is 3")
    refused(
        working_folder,
        run_eval("hotpotqa", "hotpot.json", "--set", "split=[1]"),
        "The split of the task hotpotqa must be text",
        "[1]",
    )


def test_histories_that_are_too_long_give_a_short_error(working_folder, run_eval, punkt):
    counted = ["--set", "tokenizer=base"]
    texts = [" ".join(f"{number}. Ann lives in {place}." for number in range(60)) for place in ("Oslo", "Rome")]
    rows = [row("factconsolidation_sh_6k", text, ("Where does Ann live?", ["Oslo"])) for text in texts]
    write(working_folder / "facts.json", [{**rows[0], "context": FACTS}, rows[1]])
    # A chunk of 512 tokens with the text around it exceeds 512 positions, for the second text.
    result = run_eval("memoryagentbench", "facts.json", *counted, "--conditions", "zero_state")
    refused(
        working_folder, result, "facts.json row 2 question 1: session 1 of its history is too long", "512 positions"
    )
    result = run_eval("memoryagentbench", "facts.json", *counted, "--set", "chunk=100")
    refused(
        working_folder, result, "facts.json row 2 question 1 is too long", "10 of them for the answer", "--conditions"
    )
    options = ["--set", "chunk=100", "--conditions", "zero_state,donor_state"]
    result = run_eval("memoryagentbench", "facts.json", *counted, *options)
    assert result.code == 0 and json.loads(result.out)["groups"] == ["conflict resolution, factconsolidation_sh_6k"]


def test_a_conversation_that_is_too_long_gives_a_short_error(working_folder, run_eval):
    turns = [{"speaker": "Ben", "text": "I moved to Oslo."}] * 60
    long = {**TALK, "sample_id": "talk-8", "conversation": {**TALK["conversation"], "session_2": turns}}
    write(working_folder / "talks.json", [TALK, long])
    result = run_eval("locomo", "talks.json", "--conditions", "zero_state")
    refused(working_folder, result, "talks.json conversation 2 question 1: session 2 of its history is too long")
