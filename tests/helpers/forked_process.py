"""Processes that start quickly, forked from one that has already imported everything."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any


def forked_process(target, *args) -> BaseProcess:
    """A process, not yet started, that runs `target`, a function of an importable module."""
    return _context().Process(target=target, args=args)


def run_in_fork(target: Callable[..., Any], *args: Any) -> Any:
    """Runs `target` in a separate process, which changes nothing in this one, and returns or raises its result."""
    with ProcessPoolExecutor(1, mp_context=_context()) as pool:
        return pool.submit(target, *args).result()


def _context() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(["deltamem_tool.training"])
    return context
