"""Write docs/cli.md from the commands' help, docs/api.md from the public names' docstrings, and docs/recipe.md from the
recipe's schema.

    make docs

`tests/docs/test_reference.py` fails if they are stale.
"""

from __future__ import annotations

import ast
import inspect
import json
import logging
import re
import sys
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import click

import deltamem_tool
from deltamem_tool.cli import COMMANDS, cli
from deltamem_tool.recipe import schema

DOCS = Path(__file__).parents[1] / "docs"
WIDTH = 100
WRITTEN_BY = "<!-- Written by `make docs`: change the code, not this page. -->"


def cli_page() -> str:
    """Return the page with the `--help` of every command."""
    group = _context(cli, "deltamem")
    lines = ["# Commands", "", WRITTEN_BY, "", *_code(cli.get_help(group))]
    for name in COMMANDS:
        command = cli.get_command(group, name)
        assert command is not None
        lines += ["", f"## deltamem {name}", "", *_code(command.get_help(_context(command, name, group)))]
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """Return the page with signature and docstring of every public name, and of the public methods of classes."""
    lines = [
        "# Python",
        "",
        WRITTEN_BY,
        "",
        "The public names of `import deltamem_tool as deltamem`. Libraries such as PyTorch are imported only when you",
    ]
    lines += ["use a name that needs them."]
    for name in sorted(set(deltamem_tool.__all__) - {"__version__"}, key=str.lower):
        thing = getattr(deltamem_tool, name)
        lines += ["", f"## deltamem.{name}", "", *_entry(name, thing)]
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                if not method.startswith("_") and _is_documented(value):
                    lines += ["", f"### {name}.{method}", "", *_entry(method, value)]
    return "\n".join(lines) + "\n"


# Descriptions of the types in `deltamem_tool.recipe.schema`.
TYPES = {
    "Count": "1 or more",
    "Facts": f"1 to {len(schema.KIND_OF)}",
    "Name": "a path or Hub id",
    "Optimizer": "a name that the Trainer knows",
    "Pairs": "a mapping",
    "Positive": "above 0",
    "Prompt": "text",
    "Reporter": "a name that the Trainer knows",
    "Scheduler": "a name that the Trainer knows",
    "Seed": "0 to 2³² − 1",
    "Share": "0 to 1",
    "ShareBelowOne": "0 to 1, excluding 1",
    "StrictBool": "`true`, `false`",
    "Text": "text",
    "Weight": "0 or more",
    "Whole": "0 or more",
}


def recipe_page() -> str:
    """Return the page with every key of a recipe: its values, its default and its description."""
    tree = ast.parse(inspect.getsource(schema))
    source = inspect.getsource(schema).splitlines()
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    lines = ["# Recipe reference", "", WRITTEN_BY, ""]
    lines += ["A recipe is the YAML file of a training run. This page lists its keys; [training.md](training.md)"]
    lines += ["explains how to use them. On the command line, `--set section.key=value` changes any of them."]
    for title, kind in {"": schema.Recipe, **schema.SECTIONS}.items():
        lines += ["", f"## `{title}`" if title else "## Top level", ""]
        if kind.__name__ not in classes:  # options of the mechanism, which are documented elsewhere
            lines += [
                f"The options of `{kind.__name__}` ([api.md](api.md)), and `preset`: `tsw`, `ssw` or `msw`, whose"
            ]
            lines += ["options the others override."]
            continue
        summary, _, rest = (inspect.getdoc(kind) or "").partition("\n")
        of_arguments = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", rest, re.MULTILINE))
        lines += [summary, "", "| key | values | default | |", "|---|---|---|---|"]
        defaults = {entry.name: entry.default for entry in fields(kind)}
        for node in classes[kind.__name__].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in defaults:
                name = node.target.id
                said = of_arguments.get(name) or source[node.lineno - 1].partition("  # ")[2]
                cells = [f"`{name}`", _values(ast.unparse(node.annotation)), _default(defaults[name]), said]
                lines.append(f"| {' | '.join(' '.join(cell.split()) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _values(annotation: str) -> str:
    """Describe the type of a key."""
    annotation = annotation.removesuffix(" | None")
    if literal := re.fullmatch(r"Literal\[(.*)\]", annotation):
        return ", ".join(f"`{value}`" for value in ast.literal_eval(f"({literal[1]},)"))
    if limited := re.fullmatch(r"Annotated\[Count, Field\(le=(\w+)\)\]", annotation):
        return f"1 to {getattr(schema, limited[1])}"
    if annotation == "Texts" or annotation.startswith("tuple["):
        return "a list"
    return TYPES.get(annotation, "a section")


def _default(value: Any) -> str:
    if value is MISSING:
        return "required"
    if is_dataclass(value) or value is None or value == ():
        return ""
    if isinstance(value, bool | tuple):
        return f"`{json.dumps(value)}`"
    return f"`{value}`"


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
    hints = get_type_hints(function)  # without pydantic's constraints
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
    """Split at commas outside of brackets."""
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


PAGES = {DOCS / "cli.md": cli_page, DOCS / "api.md": api_page, DOCS / "recipe.md": recipe_page}

if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as the command does
    pages = {path: page() for path, page in PAGES.items()}
    if "--check" in sys.argv:
        stale = [path.name for path, page in pages.items() if path.read_text(encoding="utf-8") != page]
        sys.exit(f"stale: {', '.join(stale)}; run make docs" if stale else 0)
    for path, page in pages.items():
        path.write_text(page, encoding="utf-8")
