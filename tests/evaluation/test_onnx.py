"""Evaluating an ONNX folder gives the same answers, records and scores as its adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from evaluation.asked import Asked, item
from evaluation.test_likelihood import TOLERANCE, Likely
from helpers.tiny import randomise
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, OnnxModel, attach, evaluate, export_onnx
from deltamem_tool.baselines.lora import Lora
from deltamem_tool.cli.evaluate import command
from deltamem_tool.errors import ConfigError, DataError, ExportError
from deltamem_tool.evaluation.conditions import EvalProtocol
from deltamem_tool.evaluation.records import SETTINGS_FILE
from deltamem_tool.evaluation.scoring.scales import LOG_PROB
from deltamem_tool.evaluation.tasks.agreement import Agreement

pytestmark = pytest.mark.slow

TASK = Asked([item(number, question, sessions=1 + number % 2) for number in range(3) for question in range(2)])
MEMORY = EvalProtocol.parse("memory")
BOTH = ("state", "zero_state", "donor_state", "mean_state", "permuted_state", "full_context", "bm25", "truncated")


@pytest.fixture(scope="module", params=["token", "message"])
def pair(request, checkpoint, tokenizer, tmp_path_factory):
    """A model with its adapter, and its ONNX folder."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    randomise(attach(model, DeltaMemConfig(rank=4, granularity=request.param)))
    folder = tmp_path_factory.mktemp("onnx") / "onnx"
    export_onnx(model, tokenizer, folder, logits="all")
    return model, OnnxModel(folder)


@pytest.mark.parametrize("protocol", ["memory", "window:40", "full"])
def test_answers_records_and_scores_match_the_adapter(pair, tokenizer, protocol):
    model, onnx = pair
    chosen, options = EvalProtocol.parse(protocol), {"retrieved": True, "truncate": 30}
    in_torch = evaluate(model, tokenizer, TASK, chosen, **options)
    in_onnx = evaluate(onnx, None, TASK, chosen, batch_size=4, **options)
    conditions = [c.name for c in in_onnx.conditions]
    assert conditions == [name for name in BOTH if name != "full_context" or protocol != "full"]
    assert in_onnx.records == [record for record in in_torch.records if record.condition in conditions]
    assert (in_torch.runtime, in_onnx.runtime) == ("pytorch", "onnx")


def test_likelihoods_match_the_adapter(pair, tokenizer):
    model, onnx = pair
    in_torch, in_onnx = (evaluate(each, tokenizer, Likely(), MEMORY, only=BOTH[:6]) for each in (model, onnx))
    for ours, theirs in zip(in_torch.records, in_onnx.records, strict=True):
        assert (ours.item, ours.condition) == (theirs.item, theirs.condition)
        assert theirs.scores[LOG_PROB] == pytest.approx(ours.scores[LOG_PROB], abs=TOLERANCE)


def test_a_graph_with_only_the_last_logits_raises_before_histories_are_written(pair, tokenizer, tmp_path):
    model, _ = pair
    export_onnx(model, tokenizer, tmp_path / "last")
    stages = []
    with pytest.raises(ExportError, match="no logits of every position"):
        evaluate(OnnxModel(tmp_path / "last"), None, Likely(), MEMORY, report=lambda *stage: stages.append(stage))
    assert stages == []


@pytest.mark.parametrize("name", ["scale_zero", "no_adapter", "lora"])
def test_conditions_that_change_weights_raise(pair, name):
    lora = Lora(Path("lora"), None, None) if name == "lora" else None
    with pytest.raises(ConfigError, match=f"The condition {name} needs PyTorch.\n.*fixed.\nEvaluate the adapter"):
        evaluate(pair[1], None, TASK, MEMORY, only=("state", name), lora=lora)


def test_agreement_with_the_base_needs_pytorch(pair):
    with pytest.raises(ConfigError, match="The condition no_adapter needs PyTorch"):
        evaluate(pair[1], None, Agreement(), MEMORY)


def test_records_of_another_runtime_are_not_reused(pair, tokenizer, tmp_path):
    model, onnx = pair
    first = evaluate(onnx, None, TASK, MEMORY, only=("state",), folder=tmp_path)
    assert evaluate(onnx, None, TASK, MEMORY, only=("state",), folder=tmp_path).records == first.records
    assert json.loads((tmp_path / SETTINGS_FILE).read_text())["runtime"] == "onnx"
    with pytest.raises(DataError, match="Its runtime differ"):
        evaluate(model, tokenizer, TASK, MEMORY, only=("state",), folder=tmp_path)


def test_the_eval_command_accepts_an_onnx_folder(pair):
    words = [str(pair[1].folder), "--set", "facts=[1]", "--set", "episodes=3", "--json"]
    answer = CliRunner().invoke(command, words)
    assert answer.exit_code == 0, answer.output
    payload = json.loads(answer.stdout)
    assert payload["run"]["options"]["runtime"] == "onnx" and payload["adapter"] == pair[1].adapter
    assert {"onnxruntime", "onnxruntime-gpu"} & {*payload["run"]["versions"]}
    assert list(payload["conditions"]) == list(BOTH[:6])
    for more, says in ((["--device", "cpu"], "only for an adapter"), (["--task", "lm_eval:ifeval"], "need PyTorch")):
        refused = CliRunner().invoke(command, [*words, *more])
        assert says in refused.output + str(refused.exception)
