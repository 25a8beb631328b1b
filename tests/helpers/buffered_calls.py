"""Calls of a `BufferedGraph`, and the contents of its pasts."""

from __future__ import annotations

import numpy as np

from deltamem_tool.onnx.runtime.ortvalue import to_numpy


def called(graph, tokens, past, writes=True):
    """One call over `tokens`, int `[B, T]`, none of it padding."""
    ids = np.array(tokens, np.int64)
    mask = np.ones((len(ids), past.length + ids.shape[1]), np.int64)
    return graph.step(ids, mask, np.full(ids.shape, writes), past)


def called_with(graph, ids, mask, past):
    """One call, all of whose tokens write; `mask` is `[B, P + T]`."""
    return graph.step(ids, mask, np.ones(ids.shape, bool), past)


def fed(graph, tokens, past):
    """Logits of the last of `tokens`, which are fed one by one; and the past."""
    for token in tokens:
        logits, past = called(graph, [[token]], past)
    return logits, past


def content(graph, past):
    """The contents of a past: keys and values of its columns, and its memory."""
    cache = {name: to_numpy(value)[:, :, : past.length].copy() for name, value in past.lease.buffers.cache.items()}
    return cache | {("state", i): state for i, state in graph.states(past).items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name
