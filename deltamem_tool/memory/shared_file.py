"""A memory file that several programs may write, without one of them overwriting what another has written."""

from __future__ import annotations

from pathlib import Path

from deltamem_tool.errors import MemoryStateError
from deltamem_tool.io.atomic import file_lock, free_name, resolve
from deltamem_tool.io.names import expand_user
from deltamem_tool.memory.file import StoredMemory, read_memory, write_memory


class SharedMemoryFile:
    """A memory file, together with the content that this program last read from it or wrote to it.

    Args:
        path: path of the file, which need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = self._origin = expand_user(path)
        self._digest: str | None = None

    def is_at(self, path: Path) -> bool:
        """Return whether `path` leads to the same file."""
        return resolve(path) == resolve(self.path)

    def read(self) -> StoredMemory | None:
        """Read the current content of the file, or return None if there is no file.

        Raises:
            MemoryStateError: the file is not a memory file, has a newer format, or contains NaN.
        """
        memory = read_memory(self.path) if self.path.exists() else None
        self._digest = None if memory is None else memory.digest()
        return memory

    def write(self, memory: StoredMemory, replace: bool = False) -> None:
        """Write the file, unless another program has changed it since this program last read or wrote it.

        Args:
            memory: memory to write.
            replace: write the file whatever it contains.

        Raises:
            MemoryConflict: the file has changed; `memory` was written to another file beside it.
            MemoryStateError: the memory contains NaN or infinity; nothing was written.
        """
        digest = memory.digest()
        with file_lock(self.path):
            file = self.beside() if not replace and self._has_changed(digest) else self
            write_memory(file.path, memory)
            file._digest = digest
        if file is not self:
            raise MemoryConflict(self.path, file)

    def beside(self) -> SharedMemoryFile:
        """Return a file with an unused name beside this one, for a memory that must not be written to this one."""
        other = SharedMemoryFile(free_name(self._origin, self._origin.suffix))
        other._origin = self._origin
        return other

    def _has_changed(self, digest: str) -> bool:
        """Return whether the file has unknown content. `digest` is that of the content about to be written."""
        if not self.path.exists():
            return False
        try:
            return read_memory(self.path).digest() not in (self._digest, digest)
        except MemoryStateError:
            return True


class MemoryConflict(MemoryStateError):
    """Another program has changed a memory file. This program's memory is now in the file `beside`."""

    def __init__(self, path: Path, beside: SharedMemoryFile) -> None:
        super().__init__(
            f"{path} was changed by another program.",
            f"It stays as it is now, and this memory is kept in {beside.path}.",
            "Both can be loaded: go on with the one that you want.",
        )
        self.beside = beside
