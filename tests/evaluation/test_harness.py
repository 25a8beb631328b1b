"""Tasks of lm-evaluation-harness with the memory attached: each request starts from zeros, alone or in a batch."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from baselines.loras import make_lora
from baselines.statics import make_static
from click.testing import CliRunner
from evaluation.harness_tasks import ANSWER, BOTH, CHOICE, ELSEWHERE, STORY, write_tasks
from helpers.model_runs import cache_of
from helpers.tiny import randomise, tiny_model
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, MemoryCache, attach
from deltamem_tool._compat import cache_argument
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.baselines.lora import Lora
from deltamem_tool.baselines.static import Static
from deltamem_tool.cli.evaluate import command
from deltamem_tool.errors import AdapterError, ConfigError, DataError, DeltaMemError
from deltamem_tool.evaluation import harness_run
from deltamem_tool.evaluation.conditions import PYTORCH, STATE
from deltamem_tool.evaluation.harness import check_options, find_harness, prepare
from deltamem_tool.evaluation.harness_run import SCORE, evaluate_harness
from deltamem_tool.evaluation.processes import Processes
from deltamem_tool.evaluation.records import RECORDS_FILE
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.attachment import find_attachment
from deltamem_tool.segments.encode import tag_chat
from deltamem_tool.segments.template import render

TOLERANCE = 1e-4  # for the log-probability of a choice, a float32 sum over tokens, padded in a batch or alone
LIMIT = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("lm_eval") / "tasks")


@pytest.fixture(scope="module", params=["token", "message"])
def model(request, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4, granularity=request.param)))
    return model


@pytest.fixture(scope="module")
def harness(folder):
    return prepare(find_harness(f"lm_eval:{CHOICE},{ANSWER}", {"include_path": str(folder)}), LIMIT)


@pytest.fixture(scope="module")
def evaluation(model, tokenizer, harness):
    return evaluate_harness(model, tokenizer, harness, batch_size=3)


def asked(folder):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()][:LIMIT]
    return [([{"role": "user", "content": f"{row['told']} {row['question']}"}], row) for row in rows]


def from_zeros(model, tokenizer, messages):
    """The tokens of a prompt, and a cache from zeros with its tags, or None for a model without a memory."""
    granularity = adapter_of(model).config.granularity if find_attachment(model) is not None else None
    tagged = tag_chat(tokenizer, messages, granularity or "token", add_generation_prompt=True)
    cache = None if granularity is None else MemoryCache(model)
    if granularity == "message":
        cache.segment_tags = torch.tensor([tagged.tags], dtype=torch.int8)
    return torch.tensor([tagged.input_ids]), cache


@torch.no_grad()
def choice_alone(model, tokenizer, messages, choice):
    prompt, cache = from_zeros(model, tokenizer, messages)
    choice_ids = torch.tensor([tokenizer(choice, add_special_tokens=False).input_ids])
    name = cache_argument(model.forward)  # also for a model without a memory
    logits = model(prompt, use_cache=True, **{name: cache})
    past = cache_of(logits)
    log_prob, last = 0.0, logits.logits[0, -1]
    for token in choice_ids[0]:
        log_prob += float(last.log_softmax(0)[token])
        last = model(token[None, None], use_cache=True, **{name: past}).logits[0, -1]
    return log_prob


def answer_alone(model, tokenizer, messages):
    prompt, cache = from_zeros(model, tokenizer, messages)
    kwargs = {} if cache is None else {"cache": cache}
    output = model.generate(prompt, max_new_tokens=16, do_sample=False, **kwargs)
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).split("\n")[0]


def test_every_request_matches_the_same_request_alone(model, tokenizer, folder, evaluation):
    base, lines = tiny_model(vocab_size=len(tokenizer)), {}
    for record in evaluation.records:
        lines.setdefault(record.condition, []).append(record)
    for plain, conditions in ((model, ["state"]), (base, ["scale_zero", "no_adapter"])):
        for number, (messages, row) in enumerate(asked(folder)):
            alone = [choice_alone(plain, tokenizer, messages, text) for text in row["choices"]]
            expected = answer_alone(plain, tokenizer, messages)
            lengths = [len(text) for text in row["choices"]]
            for condition in conditions:
                choice, answer = lines[condition][number], lines[condition][LIMIT + number]
                assert (choice.item, answer.item) == (f"{CHOICE}/{number}", f"{ANSWER}/{number}")
                assert choice.question == answer.question == render(tokenizer, messages, generation_prompt=True)
                likely = [float(value) for value, _ in json.loads(choice.answer)]
                assert likely == pytest.approx(alone, abs=TOLERANCE)
                assert choice.scores["acc"] == float(likely[1] > likely[0])
                assert choice.scores["acc_norm"] == float(likely[1] / lengths[1] > likely[0] / lengths[0])
                assert answer.answer == expected and answer.right == [row["choices"][1]]
    for ours, theirs in zip(lines["state"], lines["no_adapter"], strict=True):
        assert ours.answer != theirs.answer  # the memory has an effect


def test_the_batch_size_changes_nothing(model, tokenizer, harness, evaluation):
    single = evaluate_harness(model, tokenizer, harness, only=[STATE], batch_size=1)
    for one, other in zip(single.records, evaluation.records, strict=False):
        if one.item.startswith(ANSWER):
            assert one == other
        else:
            numbers = [[value for value, _ in json.loads(record.answer)] for record in (one, other)]
            assert numbers[0] == pytest.approx(numbers[1], abs=TOLERANCE)


def test_the_order_of_requests_changes_nothing(model, tokenizer, folder):
    """One model of the harness answers the requests in reverse: nothing carries over from one request to the next."""
    from lm_eval.api.instance import Instance

    from deltamem_tool.evaluation.harness_model import MemoryLM

    texts = []
    lm = MemoryLM(model, tokenizer, 1, True, lambda *done: texts.append(done))
    prompts = [lm.apply_chat_template(messages) for messages, _ in asked(folder)]
    kinds = {
        "loglikelihood": [(prompt, row["choices"][0]) for prompt, (_, row) in zip(prompts, asked(folder), strict=True)],
        "generate_until": [(prompt, {"until": ["\n"], "max_gen_toks": 8}) for prompt in prompts],
    }
    for kind, arguments in kinds.items():
        requests = [Instance(kind, {}, each, 0) for each in arguments]
        forth, back = getattr(lm, kind)(requests), getattr(lm, kind)(requests[::-1])
        assert forth == back[::-1] and len(set(forth)) > 1
        assert texts[-1] == (LIMIT, LIMIT)


def test_scores_are_paired_by_document(evaluation):
    assert evaluation.metrics == [SCORE] and evaluation.groups == [CHOICE, ANSWER]  # acc and exact_match
    assert evaluation.task == f"lm_eval:{CHOICE},{ANSWER}" and evaluation.other_conditions == [
        "scale_zero",
        "no_adapter",
    ]
    state, documents = evaluation.scores(SCORE, STATE)
    base, same = evaluation.scores(SCORE, "no_adapter")
    assert documents == same and len(set(documents)) == 2 * LIMIT
    apart = evaluation.difference(SCORE, "no_adapter")
    assert apart.histories == 2 * LIMIT and apart.mean == pytest.approx((sum(state) - sum(base)) / (2 * LIMIT))


@pytest.mark.parametrize("number", [0, 1])
def test_two_processes_divide_the_requests(model, tokenizer, harness, evaluation, monkeypatch, number):
    """Runs one of two processes, which gets the records of the other at the end."""

    class OneOfTwo(Processes):
        def all(self, own):
            own = {(record.condition, record.item) for record in own}
            return [[record for record in evaluation.records if (record.condition, record.item) not in own]]

        def from_main(self, value):
            return value

    process, own, units = OneOfTwo(number, 2), harness_run._ask_documents, []
    monkeypatch.setattr(harness_run.Processes, "from_model", lambda model: process)
    monkeypatch.setattr(
        harness_run, "_ask_documents", lambda *inputs: units.append((inputs[4].name, inputs[3])) or own(*inputs)
    )
    assert evaluate_harness(model, tokenizer, harness, batch_size=3).records == evaluation.records
    assert units == [(c.name, name) for c in evaluation.conditions for name in (CHOICE, ANSWER)][number::2]


def test_a_stopped_run_resumes(model, tokenizer, harness, tmp_path, monkeypatch, capfd, caplog):
    options = {"only": [STATE], "batch_size": 3, "folder": tmp_path, "settings": {"adapter": "a"}}
    first = evaluate_harness(model, tokenizer, harness, **options)
    assert capfd.readouterr().err == "" and not caplog.messages  # no progress bar and no notice from the harness
    lines = (tmp_path / RECORDS_FILE).read_text().splitlines(keepends=True)
    (tmp_path / RECORDS_FILE).write_text("".join(lines[:-2]))  # in the middle of the second task
    own, names = harness_run._ask_documents, []
    monkeypatch.setattr(harness_run, "_ask_documents", lambda *inputs: names.append(inputs[3]) or own(*inputs))
    assert evaluate_harness(model, tokenizer, harness, **options).records == first.records
    assert names == [ANSWER]
    assert evaluate_harness(model, tokenizer, harness, **options).records == first.records
    assert names == [ANSWER] and len((tmp_path / RECORDS_FILE).read_text().splitlines()) == len(lines)
    with pytest.raises(DataError, match="adapter differ"):
        evaluate_harness(model, tokenizer, harness, **{**options, "settings": {"adapter": "b"}})


def test_invalid_harness_tasks_raise(folder, tokenizer):
    path = {"include_path": str(folder)}
    for task, options, says in (
        ("lm_eval:told_choise", path, "no task 'told_choise' in .*\nDid you mean told_choice"),
        ("lm_eval:", {}, "does not name a task"),
        (f"lm_eval:{CHOICE}", {"fewshot": 3}, "does not take these options"),
        (f"lm_eval:{CHOICE}", {"include_path": str(folder / "nowhere")}, "no folder"),
        (f"lm_eval:{CHOICE}", {"include_path": 5}, "include_path must be text.\nIt is 5"),
        (f"lm_eval:{CHOICE}", {**path, "system": 5}, "system must be text"),
        (f"lm_eval:{CHOICE}", {**path, "num_fewshot": "two"}, "num_fewshot must be a number, 0 or more.\nIt is 'two'"),
        (f"lm_eval:{CHOICE}", {**path, "num_fewshot": -1}, "num_fewshot must be a number, 0 or more"),
        (f"lm_eval:{CHOICE}", {**path, "chat": "no"}, "chat must be true or false"),
        (f"lm_eval:{BOTH},{CHOICE}", path, f"{CHOICE} is named twice, by {BOTH} and by {CHOICE}"),
    ):
        with pytest.raises(ConfigError, match=says):
            prepare(find_harness(task, options))
    prepare(find_harness(f"lm_eval:{STORY},{BOTH}", path))
    with pytest.raises(DataError, match=r"data of the task told_elsewhere cannot be loaded.\n.*\nTry again with a net"):
        prepare(find_harness(f"lm_eval:{ELSEWHERE}", path))
    for protocol, retrieved in (("full", False), ("memory", True)):
        with pytest.raises(ConfigError, match="have no history"):
            check_options(protocol, retrieved, False, PYTORCH)
    with pytest.raises(ConfigError, match="questions always write into the memory"):
        check_options("memory", False, True, PYTORCH)
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=64)
    attach(model, DeltaMemConfig(rank=4))
    story = prepare(find_harness(f"lm_eval:{STORY}", path), 1)
    with pytest.raises(ConfigError, match="no condition 'donor_state'"):
        evaluate_harness(model, tokenizer, story, only=["donor_state"])
    with pytest.raises(ConfigError, match="told_story has no score from 0 to 1 for each document"):
        evaluate_harness(model, tokenizer, story, only=[STATE])
    for task, system in ((CHOICE, "Be kind. " * 20), (ANSWER, "Be kind. " * 20)):
        long = prepare(find_harness(f"lm_eval:{task}", {**path, "system": system}), 1)
        with pytest.raises(DataError, match=r"A prompt is too long for the model: [0-9]+ tokens, where (64|48) fit"):
            evaluate_harness(model, tokenizer, long, only=[STATE])


@pytest.mark.parametrize("task", [CHOICE, ANSWER])
def test_nan_logits_raise(folder, tokenizer, task):
    model = tiny_model(vocab_size=len(tokenizer))
    attach(model, DeltaMemConfig(rank=4))
    model.get_output_embeddings().weight.data.fill_(torch.nan)
    requests = prepare(find_harness(f"lm_eval:{task}", {"include_path": str(folder)}), 1)
    with pytest.raises(DeltaMemError, match="logits contain NaN"):
        evaluate_harness(model, tokenizer, requests, only=[STATE])


@pytest.mark.parametrize("kind", ["lora", "static"])
def test_a_baseline_adapter_is_evaluated_alongside_the_memory(kind, tokenizer, checkpoint, harness, folder, tmp_path):
    """Its answers equal those that it gives alone."""
    model, base = (AutoModelForCausalLM.from_pretrained(checkpoint).eval() for _ in range(2))
    config = DeltaMemConfig(rank=4)
    randomise(attach(model, config))
    adapters = [
        Lora.read(make_lora(checkpoint, tmp_path / f"lora{seed}", seed))
        if kind == "lora"
        else Static.read(make_static(model, config, tmp_path / f"static{seed}", seed))
        for seed in range(2)
    ]
    options = {"batch_size": 3, kind: adapters[0], "folder": tmp_path / "records"}
    evaluation = evaluate_harness(model, tokenizer, harness, only=[kind], **options)
    with adapters[0].applied_to(base):
        for record, (messages, row) in zip(evaluation.records[:LIMIT], asked(folder), strict=True):
            alone = [choice_alone(base, tokenizer, messages, text) for text in row["choices"]]
            assert [float(value) for value, _ in json.loads(record.answer)] == pytest.approx(alone, abs=TOLERANCE)
        assert evaluation.records[LIMIT].answer == answer_alone(base, tokenizer, asked(folder)[0][0])
    missing = str(tmp_path / "gone") if kind == "lora" else replace(adapters[0].base, fingerprint="0" * 64)
    with pytest.raises(AdapterError, match=r"cannot be compared|trained on another base model"):
        evaluate_harness(model, tokenizer, harness, **{kind: replace(adapters[0], base=missing)})
    for other in (None, adapters[1]):
        with pytest.raises(DataError, match=f"Its {kind} differ"):
            evaluate_harness(model, tokenizer, harness, **{**options, kind: other})


def test_an_adapter_that_writes_by_message_needs_messages(folder, tokenizer):
    """An adapter that writes by messages cannot read a prompt without any."""
    model = tiny_model(vocab_size=len(tokenizer))
    attach(model, DeltaMemConfig(rank=4, granularity="message"))
    plain = prepare(find_harness(f"lm_eval:{CHOICE}", {"include_path": str(folder), "chat": False}), 1)
    with pytest.raises(DataError, match="no messages that the memory could write"):
        evaluate_harness(model, tokenizer, plain, only=[STATE])


def test_the_missing_harness_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"need the package lm_eval.\n.*\npip install 'deltamem-tool\[harness\]'"):
        prepare(find_harness("lm_eval:ifeval", {}))


def test_the_eval_command_runs_a_harness_task(tmp_path, folder, checkpoint):
    adapter = tmp_path / "adapter"
    create_adapter(str(checkpoint), DeltaMemConfig(rank=4), adapter)
    options = [str(adapter), "--task", f"lm_eval:{CHOICE}", "--set", f"include_path={folder}", "--limit", "3", "--json"]
    options += ["--lora", str(make_lora(checkpoint, tmp_path / "lora")), "--conditions", "scale_zero,no_adapter,lora"]
    report = json.loads(CliRunner().invoke(command, options).stdout)
    assert report["task"] == f"lm_eval:{CHOICE}" and report["metric"] == "acc" and report["questions"] == [3]
    assert list(report["conditions"]) == ["state", "scale_zero", "no_adapter", "lora"]
    assert report["differences"]["no_adapter"]["mean"] == 0.0  # a fresh adapter corrects nothing


def test_unknown_tokens_may_pad_but_raise_in_a_prompt(model, tokenizer, folder, evaluation, harness):
    """They are harmless as padding, and named in the error when a prompt has them."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"pad_token": "[PAD]"})
    assert evaluate_harness(model, other, harness, batch_size=3).records == evaluation.records
    path = {"include_path": str(folder), "system": "Be [PAD]."}
    for task in (CHOICE, ANSWER):
        with pytest.raises(DataError, match=r"does not know: '\[PAD\]'"):
            evaluate_harness(model, other, prepare(find_harness(f"lm_eval:{task}", path), 1))
