"""Conversations in PyTorch with models that have their own cache classes."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.hybrids import OTHER_CACHES, hybrid
from helpers.tiny import tiny_tokenizer

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.chat.torch_engine import TorchModel

TOLERANCE = 1e-4  # of logits
CALLS = (11, 1, 9, 1, 1)  # tokens of each


@pytest.mark.parametrize("name", OTHER_CACHES)
def test_a_text_in_pieces_matches_the_whole(name):
    tokenizer = tiny_tokenizer()
    engine = TorchModel(hybrid(name, tokenizer), tokenizer)
    ids = np.random.default_rng(0).integers(10, len(tokenizer), (1, sum(CALLS)))
    start = past = Conversation(engine)._place.past
    expected, _ = engine.step(start, ids, np.ones_like(ids), ids > 0, all_positions=True)
    stop, logits = 0, []
    for count in CALLS:
        new, stop = slice(stop, stop + count), stop + count
        of_call, past = engine.step(
            past, ids[:, new], np.ones((1, stop), np.int64), ids[:, new] > 0, all_positions=True
        )
        logits.append(of_call)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, rtol=0, atol=TOLERANCE)
