"""Processes that need not import everything anew: each is forked off one that has, and does nothing else."""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.process import BaseProcess


def forked(target, *args) -> BaseProcess:
    """One that runs `target`, a function of a module that it can import."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["deltamem_tool.training"])
    return context.Process(target=target, args=args)
