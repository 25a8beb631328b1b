"""Render the pages of an evaluation from templates. Questions and answers are untrusted text, and are escaped."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from deltamem_tool._version import __version__
from deltamem_tool.evaluation.conditions import readable_name
from deltamem_tool.evaluation.scoring.digits import decimals, number_text, signed_text
from deltamem_tool.evaluation.scoring.statistics import p_value_text

MAX_SHOWN = 700  # characters of a question or an answer on a page
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|&])")


def render_template(template: str, **values: Any) -> bytes:
    """Render a template of this package as UTF-8.

    Text that cannot be encoded, such as half of a surrogate pair, becomes a question mark.
    """
    return _environment().get_template(template).render(version=__version__, **values).encode(errors="replace")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("deltamem_tool.evaluation.report"),
        autoescape=select_autoescape(["html.jinja"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "words": readable_name,
        "figure": number_text,
        "signed": signed_text,
        "p": p_value_text,
        "short": shorten,
        "cell": escape_cell,
    }
    environment.globals["digits"] = decimals
    return environment


def shorten(text: str) -> str:
    """Return the text, truncated to the length that a page shows."""
    if len(text) <= MAX_SHOWN:
        return text
    return f"{text[:MAX_SHOWN]} … ({len(text) - MAX_SHOWN:,} more characters)"


def escape_cell(text: Any) -> str:
    """Escape text for a cell of a Markdown table: no bar ends the cell, and nothing is markup."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))
