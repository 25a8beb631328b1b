"""`deltamem architectures` prints the shipped table, and the table matches the models."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import transformers
from base_model import support_table
from packaging.version import Version

from deltamem_tool._compat import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from deltamem_tool.base_model.support import supported_types, transformers_version, types_named

KEYS = ["model_type", "supported", "branches", "export", "reason"]


def printed(deltamem, *arguments) -> list[dict]:
    result = deltamem("architectures", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def is_older() -> bool:
    """Whether the installed transformers is older than the version that the table lists."""
    return Version(transformers.__version__) < Version(transformers_version())


def test_every_type_is_listed(deltamem):
    rows = printed(deltamem)
    names = [row["model_type"] for row in rows]
    assert names == sorted(names)
    missing = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - set(names)
    newer = set(names) - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert not missing and (not newer or is_older()), f"stale: run {support_table.COMMAND}"
    for row in rows:
        assert list(row) == KEYS
        assert set(row["branches"]) <= set("qkvo") and bool(row["branches"]) == row["supported"]
        assert row["reason"] or (row["supported"] and row["branches"] == list("qkvo")), row
        assert row["supported"] or not row["export"]


@pytest.mark.slow
def test_the_table_matches_the_models():
    """If the installed transformers is older than the table's, only the types that it knows are compared."""
    known = [row for row in supported_types() if row.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    assert known == support_table.generate(), f"stale: run {support_table.COMMAND}"
    assert known == supported_types() or is_older()


def test_the_docs_have_the_same_table():
    docs = support_table.DOCS.read_text(encoding="utf-8")
    assert docs == support_table.with_table(docs, supported_types()), f"stale: run {support_table.COMMAND}"


def test_a_known_type_is_printed():
    by_name = {row.model_type: row for row in supported_types()}
    assert by_name["qwen3"].export and by_name["qwen3"].branches == list("qkvo") and by_name["qwen3"].reason is None
    assert by_name["deepseek_v3"].branches == ["q", "o"] and "latent" in (by_name["deepseek_v3"].reason or "")
    assert not by_name["mamba"].supported and "softmax" in (by_name["mamba"].reason or "")
    assert "not tried" in (by_name["gemma3n"].reason or "")
    assert "is_decoder=True" in (by_name["bert"].reason or "")


@pytest.mark.parametrize("columns", [80, 120])
def test_the_output_fits_the_terminal(deltamem, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    result = deltamem("architectures")
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= columns
    first = [line.split()[0] for line in lines if line.strip()]
    assert {row.model_type for row in supported_types()} <= set(first), "a name is cut"
    taken = sum(row.supported for row in supported_types())
    assert re.search(rf"{taken} of {len(supported_types())}\b", result.out)


@pytest.mark.parametrize("name", ["gpt_neox", "GPT-NeoX"])
def test_part_of_a_name_lists_matching_types(deltamem, name):
    assert [row["model_type"] for row in printed(deltamem, name)] == ["gpt_neox", "gpt_neox_japanese"]
    assert [row.model_type for row in types_named("bert-generation")] == ["bert-generation"]


def test_an_unknown_name_gives_a_short_error(deltamem):
    deltamem("architectures", "gtp-neox").assert_short_error("gtp-neox", "gpt_neox", "deltamem patch", code=1)
    deltamem("architectures", "[/]").assert_short_error("[/]", code=1)


def test_the_command_imports_nothing_heavy():
    code = (
        "import sys; from deltamem_tool.cli import main; sys.argv = ['deltamem', 'architectures']\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "onnx", "onnxruntime"} & set(result.stdout.splitlines()[-1].split())
