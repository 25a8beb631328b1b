"""Limits of a model read from its config: the number of positions and the size of the vocabulary."""

from __future__ import annotations

import pytest
from transformers import BloomConfig, Gemma3Config, GPT2Config, LlamaConfig, OPTConfig

from deltamem_tool.base_model.limits import Limits

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (LlamaConfig(max_position_embeddings=64), 64),
        (GPT2Config(n_positions=48), 48),
        (OPTConfig(max_position_embeddings=40), 40),
        (BloomConfig(), None),
        (LlamaConfig(max_position_embeddings=64, rope_parameters=YARN), 256),  # as Qwen writes it,
        (LlamaConfig(max_position_embeddings=256, rope_parameters=YARN), 256),  # and as others do
    ],
)
def test_the_number_of_positions_is_read_from_the_config(config, positions):
    assert Limits.from_config(config).positions == positions


def test_a_multimodal_config_gives_the_limits_of_its_language_model():
    config = Gemma3Config(text_config={"max_position_embeddings": 96, "vocab_size": 300})
    assert Limits.from_config(config) == (96, 300)
