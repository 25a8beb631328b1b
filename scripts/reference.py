"""Write docs/cli.md from the commands' help, and docs/api.md from the public names' docstrings.

    make docs

`tests/docs/test_reference.py` fails where they are stale.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import click

import deltamem_tool
from deltamem_tool.cli import COMMANDS, cli

DOCS = Path(__file__).parents[1] / "docs"
WIDTH = 100
WRITTEN_BY = "<!-- Written by `make docs`: change the code, not this page. -->"


def cli_page() -> str:
    """`--help` of every command."""
    group = _context(cli, "deltamem")
    lines = ["# Commands", "", WRITTEN_BY, "", *_code(cli.get_help(group))]
    for name in COMMANDS:
        command = cli.get_command(group, name)
        assert command is not None
        lines += ["", f"## deltamem {name}", "", *_code(command.get_help(_context(command, name, group)))]
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """Signature and docstring of every public name, and of the public methods of classes."""
    lines = [
        "# Python",
        "",
        WRITTEN_BY,
        "",
        "The names of `import deltamem_tool as deltamem`; nothing heavy is imported",
    ]
    lines += ["before one of them is used."]
    for name in sorted(set(deltamem_tool.__all__) - {"__version__"}, key=str.lower):
        thing = getattr(deltamem_tool, name)
        lines += ["", f"## deltamem.{name}", "", *_entry(name, thing)]
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                if not method.startswith("_") and _is_documented(value):
                    lines += ["", f"### {name}.{method}", "", *_entry(method, value)]
    return "\n".join(lines) + "\n"


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    return click.Context(command, info_name=name, parent=parent, **settings)


def _is_documented(value: Any) -> bool:
    return inspect.isfunction(_function(value)) and bool(_function(value).__doc__)


def _function(value: Any) -> Any:
    if isinstance(value, classmethod | staticmethod):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def _entry(name: str, value: Any) -> list[str]:
    function = _function(value)
    arguments = "" if isinstance(value, property) else _signature(function)
    signature = name + arguments
    return _code("\n".join([_wrapped(signature), "", textwrap.indent(inspect.getdoc(function) or "", "    ")]))


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    if not is_dataclass(function):
        return str(signature).replace("'", "")
    hints = get_type_hints(function)  # without what pydantic checks
    parameters = [each.replace(annotation=hints[name]) for name, each in signature.parameters.items()]
    return str(signature.replace(parameters=parameters)).replace("typing.", "")


def _wrapped(signature: str) -> str:
    if len(signature) <= WIDTH:
        return signature
    name, _, rest = signature.partition("(")
    inner, arrow, returned = rest.rpartition(")")
    parts = [part.strip() for part in _split(inner)]
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returned}" if arrow else ")"])


def _split(parameters: str) -> list[str]:
    """At commas that are in no brackets."""
    parts, depth = [""], 0
    for character in parameters:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _code(text: str) -> list[str]:
    return ["```text", *(line.rstrip() for line in text.splitlines()), "```"]


PAGES = {DOCS / "cli.md": cli_page, DOCS / "api.md": api_page}

if __name__ == "__main__":
    pages = {path: page() for path, page in PAGES.items()}
    if "--check" in sys.argv:
        stale = [path.name for path, page in pages.items() if path.read_text(encoding="utf-8") != page]
        sys.exit(f"stale: {', '.join(stale)}; run make docs" if stale else 0)
    for path, page in pages.items():
        path.write_text(page, encoding="utf-8")
