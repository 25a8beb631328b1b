"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import click

from deltamem_tool.onnx.contract import MAX_NEW_TOKENS

trust_remote_code = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python files of the base model, where its architecture is one."
)

_SAMPLING = (  # name, type, default, what it does
    ("--max-new-tokens", click.IntRange(min=1), MAX_NEW_TOKENS, "The longest answer."),
    ("--temperature", click.FloatRange(min=0), 0.0, "0: the likeliest token."),
    ("--top-k", click.IntRange(min=0), 0, "Sample among so many likeliest tokens; 0: all."),
    (
        "--top-p",
        click.FloatRange(min=0, max=1, min_open=True),
        1.0,
        "Sample among the likeliest tokens that hold this much probability.",
    ),
    (
        "--min-p",
        click.FloatRange(min=0, max=1),
        0.0,
        "Sample among the tokens with this share of the likeliest one's probability.",
    ),
    (
        "--repetition-penalty",
        click.FloatRange(min=0, min_open=True),
        1.0,
        "More than 1: what was said already becomes less likely.",
    ),
    ("--seed", click.IntRange(min=0), None, "Of the sampling."),
)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `deltamem_tool.sampling.Sampling`, under its names."""
    stop = click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; repeatable.")
    options = [
        click.option(name, type=kind, default=default, show_default=default is not None, help=help)
        for name, kind, default, help in _SAMPLING
    ]
    return reduce(lambda wrapped, option: option(wrapped), (stop, *reversed(options)), command)
