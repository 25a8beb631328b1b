from __future__ import annotations

import pytest

WHOLE = """
base: some/model
out: adapter
memory:
  rank: 4
  branches: [q, k]
  layers: [0, 2]
  alpha: 8
data:
  path: chats.jsonl
  max_write_tokens: 100
training:
  steps: 7
  learning_rate: 2e-4
  warmup: 0
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(WHOLE)
    return path
