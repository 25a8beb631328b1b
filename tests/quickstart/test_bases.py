"""The adapter that the quickstart uses, and when it trains one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deltamem_tool.errors import ConfigError, HubError
from deltamem_tool.io.names import BACKBONE
from deltamem_tool.quickstart.bases import BASES, SMOLLM2, choose_adapter


def test_fast_or_a_given_adapter_skips_training():
    assert choose_adapter(BACKBONE) is None
    assert choose_adapter(BACKBONE, fast=True) == "builtin:adapter"
    assert choose_adapter(BACKBONE, adapter="mine") == "mine"
    assert choose_adapter(SMOLLM2, adapter="mine") == "mine"


def test_a_shipped_adapter_is_used_instead_of_training():
    assert choose_adapter(SMOLLM2) == "builtin:smollm2-adapter"
    assert choose_adapter(SMOLLM2, steps=100) is None


@pytest.mark.parametrize(
    "options", [{"adapter": "mine", "fast": True}, {"adapter": "mine", "steps": 3}, {"fast": True, "steps": 3}]
)
def test_invalid_combinations_of_options_raise(options):
    with pytest.raises(ConfigError):
        choose_adapter(BACKBONE, **options)


def test_nothing_is_written_when_the_model_cannot_be_loaded(tmp_path, monkeypatch, deltamem):
    def unavailable():
        raise HubError("SmolLM2 can be fetched from nowhere.", "There is no network.", "Connect to one.")

    monkeypatch.chdir(tmp_path)
    base = replace(BASES[SMOLLM2], fetch=unavailable, size_to_fetch=lambda: "93 MB")
    monkeypatch.setitem(BASES, SMOLLM2, base)
    result = deltamem("quickstart", "--base", "smollm2")
    assert result.code == 1 and "There is no network." in result.err and "Traceback" not in result.err
    assert "is fetched once: 93 MB" in result.err
    assert list(tmp_path.iterdir()) == []
