"""Processes that need not import everything anew: each is forked off one that has, and does nothing else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any


def forked(target, *args) -> BaseProcess:
    """One that runs `target`, a function of a module that it can import."""
    return _context().Process(target=target, args=args)


def result_of(target: Callable[..., Any], *args: Any) -> Any:
    """What `target` returns or raises in a process of its own, which changes nothing in this one."""
    with ProcessPoolExecutor(1, mp_context=_context()) as pool:
        return pool.submit(target, *args).result()


def _context() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(["deltamem_tool.training"])
    return context
