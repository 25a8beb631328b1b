"""Errors of other libraries, reported in plain words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltamem_tool.errors import domain_error

TOO_MUCH = 2**50  # numbers, more than any machine can address


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: np.ones(TOO_MUCH),
        lambda: torch.ones(TOO_MUCH),
        lambda: bytearray(TOO_MUCH),
        lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    ],
)
def test_out_of_memory_errors_are_explained(allocate):
    with pytest.raises((MemoryError, RuntimeError)) as raised:
        allocate()
    error = domain_error(raised.value)
    assert error is not None and error.what == "There is not enough memory." and error.why and error.next


def test_unexpected_errors_keep_their_traceback():
    for error in (RuntimeError("The size of tensor a (2) must match"), ValueError(), AssertionError("memory")):
        assert domain_error(error) is None


def _raise(error):
    raise error
