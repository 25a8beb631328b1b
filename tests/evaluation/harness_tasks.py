"""Two tasks of lm-evaluation-harness on local data: a choice, by likelihood, and an answer, generated."""

from __future__ import annotations

import json
import random
from pathlib import Path

from deltamem_tool.data import dialogues

CHOICE, ANSWER, STORY = "told_choice", "told_answer", "told_story"
ELSEWHERE = "told_elsewhere"  # its data are on the Hub
BOTH = "told_both"  # a group of the first two

_HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{told}}}} {{{{question}}}}"
output_type: {kind}
num_fewshot: 0
"""
_CHOICE = """\
doc_to_choice: "{{choices}}"
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_ANSWER = """\
doc_to_target: "{{choices[right]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 16}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
_STORY = """\
doc_to_target: "{{told}}"
metric_list: [{metric: word_perplexity}]
"""


def write_tasks(folder: Path, count: int = 7) -> Path:
    """The folder for `include_path`."""
    rng, rows = random.Random(0), []
    for _ in range(count):
        facts = dialogues.sample_facts(rng, 2, held_out=True)
        text = " ".join(fact.statement(rng) for fact in facts)
        choices = [dialogues.sample_value(rng, facts[0].attribute, True, facts[0].value).answer, facts[0].answer]
        rows.append({"told": text, "question": facts[0].question(rng), "choices": choices, "right": 1})
    folder.mkdir()
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, rest in (
        (CHOICE, "multiple_choice", _CHOICE),
        (ANSWER, "generate_until", _ANSWER),
        (STORY, "loglikelihood_rolling", _STORY),
    ):
        (folder / f"{name}.yaml").write_text(_HEAD.format(name=name, file=file, kind=kind) + rest)
    elsewhere = f"task: {ELSEWHERE}\ndataset_path: nobody/nothing\ntest_split: test\noutput_type: generate_until\n"
    (folder / f"{ELSEWHERE}.yaml").write_text(elsewhere)
    (folder / f"{BOTH}.yaml").write_text(f"group: {BOTH}\ntask: [{CHOICE}, {ANSWER}]\n")
    return folder
