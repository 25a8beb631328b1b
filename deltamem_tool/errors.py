"""What can go wrong, as users meet it.

    DeltaMemError
    ├── ConfigError         an option or a recipe that cannot be
    ├── ArchitectureError   a base model that cannot take a memory
    ├── AdapterError        an adapter folder that is damaged, or does not fit the base model
    ├── MemoryStateError    a memory that is damaged, or does not fit the adapter, the batch or the layers
    ├── DataError           training or evaluation data that cannot be read
    ├── ExportError         an ONNX folder that is damaged, or a graph that does not compute what PyTorch computes
    ├── HubError            a repository of the Hub that cannot be read or written
    └── InstallationError   a package that is missing, broken, or of a version that deltamem does not work with

Each carries what failed, why, and what to do next; the command line prints those three and nothing else.
"""

from __future__ import annotations

import errno
import unicodedata

MAX_LINE = 500  # characters of another library's message
MAX_SAID = 8000  # characters of a sentence, which may quote a stranger's file: a hundred tensors by name


class DeltaMemError(Exception):
    """`what` failed, `why`, and what to do `next`: one sentence each."""

    def __init__(self, what: str, why: str = "", next: str = "") -> None:
        what, why, next = map(_shown, (what, why, next))
        super().__init__("\n".join(part for part in (what, why, next) if part))
        self.what, self.why, self.next = what, why, next


class ConfigError(DeltaMemError, ValueError):
    pass


class ArchitectureError(DeltaMemError, ValueError):
    pass


class AdapterError(DeltaMemError):
    pass


class MemoryStateError(DeltaMemError, ValueError):
    pass


class DataError(DeltaMemError, ValueError):
    pass


class ExportError(DeltaMemError):
    pass


class HubError(DeltaMemError):
    pass


class InstallationError(DeltaMemError, ImportError):
    pass


def domain_error(error: Exception) -> DeltaMemError | None:
    """An error for a person: `error` itself if it is one of these, or what the system refused; None for one that keeps
    its traceback."""
    if isinstance(error, DeltaMemError):
        return error
    if _no_room(error):
        return DeltaMemError(
            "The disk is full, or a limit on files is reached.",
            f"{first_line(error)}.",
            "Nothing was left half-written. Free some space and try again.",
        )
    refused = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
    if isinstance(error, refused) or (
        isinstance(error, OSError) and error.errno in (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
    ):
        return DeltaMemError(
            f"{error.filename or 'A file'} cannot be read or written.",
            f"{error.strerror or error}.",
            "Correct the path or its permissions, and try again.",
        )
    return None


def first_line(error: BaseException) -> str:
    """Return what a library's error says first, without its final dot; the error's type where it says nothing."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return lines[0][:MAX_LINE] if lines else type(error).__name__


def _shown(said: str) -> str:
    """`said` without what steers a terminal or turns the direction of writing, and cut where nobody reads on."""
    if len(said) > MAX_SAID:
        said = said[:MAX_SAID] + "…"
    if said.isprintable():
        return said
    return "".join(
        character if character == "\n" or unicodedata.category(character) not in _STEERING else ascii(character)[1:-1]
        for character in said
    )


_STEERING = ("Cc", "Cf", "Cs")


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
    return any(said in str(error) for said in words)
