"""`benchmarks/common.py`: the measured time and memory of a command."""

from __future__ import annotations

import sys

import pytest
from common import watched

BYTES = 200_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="processes are watched through /proc")
def test_the_peak_memory_is_that_of_the_command():
    """Longer output than a pipe holds, too."""
    usage = watched("-c", f"import time; held = bytearray({BYTES}); print('x' * 100_000); time.sleep(0.5)")
    assert len(usage.output.strip()) == 100_000
    assert BYTES < usage.own <= usage.resident < BYTES + 100_000_000


def test_a_command_that_fails_ends_the_benchmark():
    with pytest.raises(SystemExit, match=r"(?s)-c .*failed:.*ValueError: no such thing"):
        watched("-c", "raise ValueError('no such thing')")
