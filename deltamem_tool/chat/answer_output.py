"""Show an answer while it is generated."""

from __future__ import annotations

from collections.abc import Callable


class AnswerOutput:
    """Writes an answer piece by piece. Where that fails the answer goes on, or its turn would be lost from the memory.

    Args:
        write: writes a piece, and flushes it.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._error: OSError | None = None

    def __call__(self, piece: str) -> None:
        """Write a piece, unless an earlier one failed."""
        if self._error is not None:
            return
        try:
            self._write(piece)
        except OSError as error:
            self._error = error

    def end(self) -> None:
        """End the line, once the memory is safe.

        Raises:
            OSError: the answer could not be written, for example to a closed pipe or a full disk.
        """
        self("\n")
        if self._error is not None:
            raise self._error
