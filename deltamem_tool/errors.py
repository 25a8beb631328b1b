"""The errors that users see.

    DeltaMemError
    ├── ConfigError         an option or a recipe is invalid
    ├── ArchitectureError   the base model does not support a memory
    ├── AdapterError        an adapter folder is damaged, or does not fit the base model
    ├── MemoryStateError    a memory is damaged, or does not fit the adapter, the batch or the layers
    ├── DataError           training or evaluation data cannot be read
    ├── ExportError         an ONNX folder is damaged, or a graph does not compute what PyTorch computes
    ├── HubError            a repository on the Hub cannot be read or written
    └── InstallationError   a package is missing, broken, or has an unsupported version

Each of them says what failed, why, and what to do next. The command line prints these three lines and nothing else.
"""

from __future__ import annotations

import difflib
import errno
import json
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

MAX_LINE = 500  # characters of another library's message
MAX_SENTENCE = 8000  # characters of a sentence, which may quote a stranger's file: a hundred tensors by name


class DeltaMemError(Exception):
    """The base class of all errors that deltamem raises for users.

    Args:
        what: what failed, in one sentence.
        why: why it failed; may be empty.
        next: what to do next; may be empty.

    Example:
        >>> import deltamem_tool as deltamem
        >>> try:
        ...     deltamem.load("builtin:other")
        ... except deltamem.DeltaMemError as error:
        ...     print(error.what)
        ...     print(error.next)
        The package does not ship builtin:other.
        Use one of these names.
    """

    def __init__(self, what: str, why: str = "", next: str = "") -> None:
        what, why, next = map(_printable, (what.replace("\n", "\\n"), why, next))
        super().__init__("\n".join(part for part in (what, why, next) if part))
        self.what, self.why, self.next = what, why, next


class OtherBaseWarning(UserWarning):
    """An adapter runs on a base model other than the one it was made for; the text says how much the two differ."""


class ConfigError(DeltaMemError, ValueError):
    """An option, a recipe or a combination of options is invalid."""


class ArchitectureError(DeltaMemError, ValueError):
    """The base model does not support a memory, or not with these options."""


class AdapterError(DeltaMemError):
    """An adapter folder is missing, damaged, or belongs to another model."""


class MemoryStateError(DeltaMemError, ValueError):
    """A memory or a memory file is damaged, or does not fit the model or the call."""


class DataError(DeltaMemError, ValueError):
    """A data set is missing, or one of its rows is invalid."""


class ExportError(DeltaMemError):
    """A model cannot be exported, or an ONNX folder cannot be run."""


class HubError(DeltaMemError):
    """The Hub cannot be reached, or refuses a request."""


class InstallationError(DeltaMemError, ImportError):
    """A package that is needed is missing, or has an unsupported version."""


def _printable(sentence: str) -> str:
    """Escape control and direction characters of `sentence`, which would affect a terminal, and cut it to a limit."""
    if len(sentence) > MAX_SENTENCE:
        sentence = sentence[:MAX_SENTENCE] + "…"
    if sentence.isprintable():
        return sentence
    return "".join(
        character if character == "\n" or unicodedata.category(character) not in _STEERING else ascii(character)[1:-1]
        for character in sentence
    )


_STEERING = ("Cc", "Cf", "Cs")


def domain_error(error: Exception) -> DeltaMemError | None:
    """Translate `error` for users, or return None if it should keep its traceback.

    A `DeltaMemError` is returned unchanged. A full disk, too little memory, or a path that cannot be read or written
    becomes one.
    """
    if isinstance(error, DeltaMemError):
        return error
    if _no_room(error):
        return DeltaMemError(
            "The disk is full, or a limit on files has been reached.",
            f"{first_line(error)}.",
            "Nothing was left half-written. Free some space and try again.",
        )
    if _no_memory(error):
        return DeltaMemError(
            "There is not enough memory.",
            f"{first_line(error)}.",
            "Use smaller batches or shorter texts, or a machine with more memory.",
        )
    refused = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
    if isinstance(error, refused) or (
        isinstance(error, OSError) and error.errno in (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO)
    ):
        return DeltaMemError(
            f"{error.filename or 'A file'} cannot be read or written.",
            f"{error.strerror or error}.",
            "Correct the path or its permissions, and try again.",
        )
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error without its final dot, or the error's type if it has no text."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return lines[0][:MAX_LINE] if lines else type(error).__name__


def _no_room(error: Exception) -> bool:
    """Whether `error` is a full disk, a quota or a limit, by itself or in the words of safetensors and torch."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    words = (
        "No space left on device",
        "File too large",
        "Disk quota exceeded",
        "iostream error",
        "inline_container.cc",
    )
    return any(part in str(error) for part in words)


def _no_memory(error: Exception) -> bool:
    """Whether the memory of the machine or of its GPU is full, by itself or in the words of torch and ONNX Runtime."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "Failed to allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(part in str(error) for part in words)


# Messages about the errors that pydantic finds, with the options' names as the user has written them.

Key = tuple[str, ...]  # ("training", "steps"); written training.steps
Known = Mapping[Key, Sequence[str]]  # the names in each section; () are those at the top


class Problem(NamedTuple):
    """What is wrong with some options."""

    keys: tuple[Key, ...]  # where: the first that is given
    why: str


_WORDS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "dataclass_type": "must be a mapping",
    "model_type": "must be a mapping",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "literal_error": "must be {expected}",
}
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden", "invalid_key")


def config_error(what: str, whys: Sequence[str]) -> ConfigError:
    """Return one error for all problems, with one line each."""
    lines = [why if why.endswith("?") else f"{why}." for why in whys]
    return ConfigError(what, "\n".join(lines), f"Correct {'it' if len(lines) == 1 else 'them'} and try again.")


def problems_of(
    error: ValidationError, known: Known, section: Key = (), names: Mapping[str, str] | None = None
) -> list[Problem]:
    """Return the problems that pydantic found in the options of `section`, which may have other `names` in a file."""
    return [_problem(detail, known, section, names or {}) for detail in error.errors(include_url=False)]


def _problem(detail: ErrorDetails, known: Known, section: Key, names: Mapping[str, str]) -> Problem:
    loc: list[int | str] = [*detail["loc"]]
    if detail["type"] in _UNKNOWN:
        return unknown_key((*section, *map(str, loc)), known)
    if loc and isinstance(loc[0], int) and loc[0] < len(known[section]):  # an argument by position
        loc[0] = known[section][loc[0]]
    entries = [part + 1 for part in loc if isinstance(part, int)]
    key = (*section, *(names.get(part, part) for part in loc if isinstance(part, str)))
    name = f"entry {entries[0]} of {'.'.join(key)}" if entries else ".".join(key)
    context = {name: f"{part:g}" if isinstance(part, float) else part for name, part in detail.get("ctx", {}).items()}
    if detail["type"] == "value_error":
        why = str(context["error"])
    elif detail["type"] == "missing":
        why = "is missing: add it, or pass --out" if key == ("out",) else "is missing: add it"
    elif detail["type"] in ("string_too_short", "too_short"):
        why = "must not be empty"
    elif detail["type"] in _WORDS:
        why = f"{_WORDS[detail['type']].format(**context)}, not {short_value(detail['input'])}"
    else:
        why = f"is invalid: {detail['msg']}"
    return Problem((key,), f"{name} {why}".strip())


def unknown_key(key: Key, known: Known) -> Problem:
    """Return the message about an unknown option, with the most similar known one of any section."""
    options = {
        (*section, option): difflib.SequenceMatcher(a=key[-1], b=option)
        for section in known
        for option in known[section]
    }
    near = max(options, key=lambda option: options[option].ratio() + 0.1 * (option[:-1] == key[:-1]))
    alike = options[near].ratio() >= 0.6  # as in difflib.get_close_matches
    hint = f"did you mean {'.'.join(near)}?" if alike else f"the known keys are {', '.join(known[key[:-1]])}"
    return Problem((key,), f"{'.'.join(key)} is not known: {hint}")


def short_value(value: Any) -> str:
    """Return a short text for a value in a file."""
    return json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
