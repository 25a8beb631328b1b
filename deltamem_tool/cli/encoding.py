"""Replace characters that the encoding of stdout lacks."""

from __future__ import annotations

import codecs
import io
import sys

_HANDLER = "deltamem_tool"
# What the commands print themselves; bars of a table are made of the last.
_ASCII = {"→": "->", "−": "-", "–": "-", "—": "-", "…": "...", "“": '"', "”": '"', "×": "x", "±": "+-", "•": "*"}
_ASCII |= {"✓": "(right)", "✗": "(wrong)", "Δ": "delta", "δ": "delta", "β": "beta", "λ": "lambda"}
_ASCII |= dict.fromkeys("▏▎▍▌▋▊▉█▐▕", "#")


def replace_unencodable() -> None:
    """Let stdout print what its encoding, such as a Windows code page, lacks, unless its user has chosen how.

    stderr does so by itself.
    """
    codecs.register_error(_HANDLER, _substitute)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors=_HANDLER)


def _substitute(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a file's name as they are, then ASCII for the signs of our own, then Python's escapes."""
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return character.encode("utf-8", "surrogateescape"), error.start + 1
    return _ASCII.get(character) or character.encode("ascii", "backslashreplace").decode(), error.start + 1
