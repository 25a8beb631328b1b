"""The model card: it holds the right facts and metadata, and keeps the user's own text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.publishing import BASE, COMMIT, adapter_folder, evaluated, onnx_folder, trained
from huggingface_hub import ModelCard, metadata_load

from deltamem_tool.adapter.config_file import SUMMARY_FILE
from deltamem_tool.errors import DataError, HubError
from deltamem_tool.hub.card import BEGIN, END, write_card
from deltamem_tool.hub.contents import Contents, read_contents
from deltamem_tool.hub.public_base import Base

REPO = "someone/memory"


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> Contents:
    root = tmp_path_factory.mktemp("contents")
    folder = evaluated(trained(adapter_folder(root / "adapter"), data="someone/talks"))
    return read_contents(folder, onnx_folder(root / "graph"))


def card(contents: Contents, old: str | None = None, license: str | None = None, base: Base | None = None) -> str:
    return write_card(contents, REPO, base or Base(BASE, COMMIT), old and old.encode(), license).decode()


def test_the_card_holds_all_known_facts(contents):
    text = card(contents, license="mit")
    for expected in (
        "98,432 parameters",
        f"[{BASE}](https://huggingface.co/{BASE}) (revision `{COMMIT}`)",
        "**4,096 bytes**",
        "4 layers",
        "| update rule | no_lambda |",
        'deltamem.load("someone/memory")',
        'OnnxModel("someone/memory")',
        "differs from PyTorch by at most 1e-05",
        "| steps | 40 |",
        "| data | someone/talks |",
        "| | 1 fact | 4 facts |",
        "| questions | 200 | 150 |",
        "| **state** | 1.00 (0.90–1.00) | 0.50 (0.40–0.60) |",
        "| donor state | 0.80 (0.70–1.00) | 0.50 (0.40–0.60) |",
        "* *donor state*: another's",
        "* the state adds 0.20 ± 0.04 over donor state",
        "`deltamem eval someone/memory --task recall --set 'facts=[1,4]'`",
        "## Limitations",
    ):
        assert expected in text, expected


@pytest.mark.parametrize(
    ("options", "data"),
    [
        ({}, "dialogues that deltamem-tool generates"),
        ({"data.generated": "facts"}, "facts that deltamem-tool generates"),
        ({"data.path": "talks.jsonl", "data.generated": "facts", "data.mix": 0.25}, "talks.jsonl"),
    ],
)
def test_the_card_says_what_was_trained_on(options, data, tmp_path):
    folder = trained(adapter_folder(tmp_path / "adapter"), data=None)
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    summary["recipe"] |= options
    (folder / SUMMARY_FILE).write_text(json.dumps(summary))
    assert f"| data | {data} |" in card(read_contents(folder))


def test_data_sets_that_the_user_names_are_kept(contents):
    """The one that the block names is from an earlier push, and is replaced."""
    for given, wanted in (
        ("[me/more, me/others]", ["me/more", "me/others", "someone/talks"]),
        ("me/more", ["me/more", "someone/talks"]),
        ("[me/more, someone/talks]", ["me/more", "someone/talks"]),
        ("[me/more, me/former]", ["me/more", "someone/talks"]),
        ("me/former", "someone/talks"),
    ):
        old = f"---\ndatasets: {given}\n---\n# Mine\n\n{BEGIN}\n\n| data | me/former |\n\n{END}\n"
        assert ModelCard(card(contents, old)).data.datasets == wanted


def test_metadata_is_readable_by_the_hub(contents, tmp_path):
    """`huggingface_hub` reads the metadata back, with separate results for every number of facts."""
    (tmp_path / "README.md").write_text(card(contents, license="mit"))
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata["base_model"] == BASE and metadata["base_model_relation"] == "adapter"
    assert metadata["library_name"] == "deltamem-tool" and metadata["pipeline_tag"] == "text-generation"
    assert metadata["license"] == "mit" and metadata["datasets"] == "someone/talks"
    assert {"delta-mem", "arxiv:2605.12357", "onnx"} <= set(metadata["tags"])
    data = ModelCard.load(tmp_path / "README.md").data
    results = {(result.dataset_config, result.metric_name): result.metric_value for result in data.eval_results}
    assert results["1 fact", "exact, state"] == 1.0
    assert results["4 facts", "exact, donor state"] == 0.5 and len(results) == 6
    assert len(metadata["model-index"][0]["results"]) == 2


def test_unknown_facts_are_left_out(tmp_path):
    alone = read_contents(adapter_folder(tmp_path / "adapter"))
    text = card(alone)
    assert "## Training" not in text and "OnnxModel" not in text and "No evaluation was pushed" in text
    assert metadata_load(_written(tmp_path, text)).keys().isdisjoint({"license", "datasets", "model-index"})
    builtin = card(alone, base=Base("builtin:backbone", None))
    assert "base_model" not in metadata_load(_written(tmp_path, builtin)) and "767 words" in builtin
    graph = read_contents(onnx_folder(tmp_path / "graph"))
    of_graph = card(graph, base=Base(None, None))
    assert "deltamem.load" not in of_graph and "that is not named" in of_graph and "**4,096 bytes**" in of_graph
    assert "base_model" not in metadata_load(_written(tmp_path, of_graph))


def test_the_base_of_the_second_shipped_adapter_is_named_as_on_the_hub(tmp_path):
    text = card(read_contents(adapter_folder(tmp_path / "adapter")), base=Base("builtin:smollm2", None))
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert f"[SmolLM2-135M-Instruct](https://huggingface.co/{base})" in text and "small backbone" not in text
    assert metadata_load(_written(tmp_path, text))["base_model"] == base


@pytest.mark.parametrize(("base", "extra"), [(BASE, "torch"), (f"{BASE}:q4.gguf", "gguf"), ("builtin:smollm2", "gguf")])
def test_the_install_command_includes_the_extra_for_the_base(base, extra, tmp_path):
    text = card(read_contents(adapter_folder(tmp_path / "adapter")), base=Base(base, None))
    assert f"pip install 'deltamem-tool[{extra}]'" in text


def test_the_users_text_is_kept(contents):
    own = "---\nlanguage: de\nlicense: cc-by-4.0\ntags:\n- mine\n---\n\n# Ours\n\nWhy we made it.\n"
    first = card(contents, own)
    assert first.endswith(f"{END}\n") and "# Ours\n\nWhy we made it.\n" in first
    edited = first.replace("Why we made it.", "Because.") + "\nThanks to all.\n"
    second = card(contents, edited.replace("98,432 parameters", "1 parameter"))
    assert second == edited and second.count(BEGIN) == 1
    metadata = yaml.safe_load(second.split("---\n")[1])
    assert metadata["language"] == "de" and metadata["license"] == "cc-by-4.0" and metadata["tags"][0] == "mine"
    assert len(metadata["tags"]) == len(set(metadata["tags"]))
    assert "license: mit" in card(contents, second, license="mit")


def test_results_of_others_are_kept(contents):
    others = [
        {
            "name": "Ours",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"type": "locomo", "name": "LoCoMo"},
                    "metrics": [{"type": "f1", "value": 0.3}],
                }
            ],
        }
    ]
    text = card(contents, f"---\nmodel-index: {json.dumps(others)}\n---\n# Ours\n")
    index = yaml.safe_load(text.split("---\n")[1])["model-index"][0]
    assert index["name"] == "Ours" and len(index["results"]) == 3
    assert index["results"][0]["dataset"]["type"] == "locomo"
    assert card(contents, text) == text


def test_windows_line_endings_are_kept(contents):
    own = "---\r\nlicense: mit\r\n---\r\n\r\n# Ours\r\n\r\nWhy.\r\n"
    text = card(contents, own)
    assert "# Ours\r\n\r\nWhy.\r\n" in text and "license: mit" in text
    assert card(contents, text) == text


@pytest.mark.parametrize(
    "old",
    [
        f"# Ours\n{BEGIN}\n",
        f"# Ours\n{END}\n{BEGIN}\n",
        f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n",
        "---\nlicense: [\n---\n# Ours\n",
        "---\n- a\n---\n# Ours\n",
    ],
    ids=["no end", "end first", "twice", "no YAML", "a list"],
)
def test_a_broken_card_raises(contents, old):
    with pytest.raises(HubError, match=r"README.md"):
        card(contents, old)


def test_a_card_in_another_encoding_raises(contents):
    with pytest.raises(HubError, match=r"README.md"):
        write_card(contents, REPO, Base(BASE, COMMIT), "# Für alle\n".encode("latin-1"), None)


def test_bars_in_values_do_not_break_tables(contents):
    training = {"recipe": {"data.path": "a|b\nc"}, "steps": 3}
    text = card(Contents(contents.files, contents.adapter, None, training))
    assert "| data | a\\|b c |" in text


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"adapter": None},
        {"groups": ["1 fact", "4 facts", "8 facts"]},
        {"scores": {"state": [[1.0, 0.9, 1.0]]}},
        {"overall": {"state": [1.0, float("nan"), 1.0]}},
        {"questions": [200]},
        {"verdict": "good"},
        {"format_version": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_evaluation_without_figures_raises(tmp_path, change):
    folder = evaluated(adapter_folder(tmp_path / "adapter"))
    file = folder / "evaluation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(DataError, match=r"evaluation.json"):
        read_contents(folder)


def _written(folder: Path, text: str) -> Path:
    (folder / "README.md").write_text(text)
    return folder / "README.md"
