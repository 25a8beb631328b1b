"""What is wrong with a recipe, in words that name the key as the file spells it."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic_core import ErrorDetails

from deltamem_tool.errors import ConfigError
from deltamem_tool.recipe.yaml_lines import Key

Known = dict[Key, list[str]]  # the names in each section; () is the recipe itself


class Problem(NamedTuple):
    keys: tuple[Key, ...]  # where: the first that is given
    why: str


def config_error(what: str, whys: Sequence[str]) -> ConfigError:
    """One error for all that is wrong, a line each."""
    lines = [why if why.endswith("?") else f"{why}." for why in whys]
    return ConfigError(what, "\n".join(lines), f"Correct {'it' if len(lines) == 1 else 'them'} and try again.")


_WORDS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "dataclass_type": "must have keys inside",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "literal_error": "must be {expected}",
    "is_instance_of": "must be a {class}",
}
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden", "invalid_key")


def in_words(detail: ErrorDetails, known: Known, section: Key = ()) -> Problem:
    """One of pydantic's errors, found in the options of `section`."""
    if detail["type"] in _UNKNOWN:
        return unknown((*section, *map(str, detail["loc"])), known)
    loc: list[int | str] = [*detail["loc"]]
    if loc and isinstance(loc[0], int) and loc[0] < len(known[section]):  # an argument by position
        loc[0] = known[section][loc[0]]
    entries = [part + 1 for part in loc if isinstance(part, int)]
    key = (*section, *(part for part in loc if isinstance(part, str)))
    name = f"entry {entries[0]} of {'.'.join(key)}" if entries else ".".join(key)
    context = {name: f"{part:g}" if isinstance(part, float) else part for name, part in detail.get("ctx", {}).items()}
    if detail["type"] == "value_error":
        why = str(context["error"])
    elif detail["type"] == "missing":
        why = "is missing: add it, or pass --out" if key == ("out",) else "is missing: add it"
    elif detail["type"] in ("string_too_short", "too_short"):
        why = "must not be empty"
    elif detail["type"] in _WORDS:
        why = f"{_WORDS[detail['type']].format(**context)}, not {shown(detail['input'])}"
    else:
        why = f"does not hold: {detail['msg']}"
    return Problem((key,), f"{name} {why}")


def unknown(key: Key, known: Known) -> Problem:
    """A key that no recipe has; the nearest that one has is named, in whichever section it is."""
    options = {
        (*section, option): difflib.SequenceMatcher(a=key[-1], b=option)
        for section in known
        for option in known[section]
    }
    near = max(options, key=lambda option: options[option].ratio() + 0.1 * (option[:-1] == key[:-1]))
    alike = options[near].ratio() >= 0.6  # as in difflib.get_close_matches
    hint = f"did you mean {'.'.join(near)}?" if alike else f"known here are {', '.join(known[key[:-1]])}"
    return Problem((key,), f"{'.'.join(key)} is not known: {hint}")


def shown(value: Any) -> str:
    """A value of a recipe, in few letters."""
    return json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
