"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deltamem_tool.errors import DeltaMemError


def write_whole(path: str | Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(staged, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(staged, path)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise


def resolve(path: str | Path) -> Path:
    """Make a path absolute and follow its symbolic links.

    Raises:
        DeltaMemError: the links lead in a circle.
    """
    resolved = Path(os.path.realpath(path))
    if resolved.is_symlink():
        raise DeltaMemError(
            f"{path} cannot be followed.", "Its symbolic links lead in a circle.", "Choose another place, or mend them."
        )
    return resolved


@contextmanager
def folder_whole(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A staging folder beside `path` that takes its name when the block ends well, and vanishes otherwise.

    Raises:
        DeltaMemError: `check_overwrite` says so.
    """
    check_overwrite(path, overwrite)
    path = resolve(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield staged
        for file in staged.rglob("*"):
            if file.is_file():
                _sync(file)
        os.chmod(staged, 0o777 & ~_umask())
        if path.exists():
            # Folders cannot be swapped in one step everywhere: the old one steps aside, and comes back on failure.
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            try:
                os.rename(path, aside / "old")
                try:
                    os.rename(staged, path)
                except BaseException:
                    os.rename(aside / "old", path)
                    raise
            except BaseException:
                with suppress(OSError):
                    aside.rmdir()  # not empty if the old folder could not come back: then it is all there is of it
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(staged, path)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def check_overwrite(path: str | Path, overwrite: bool) -> None:
    """Raise if the folder `path` cannot be written, or that would destroy something; call it before long work begins.

    Raises:
        DeltaMemError: `path` exists, is not an empty folder, and `overwrite` is false; or it cannot be replaced; or
            nothing can be written beside it.
    """
    resolved = resolve(path)
    if Path.cwd().is_relative_to(resolved) or resolved.is_mount():
        kind = "a mount point" if resolved.is_mount() else "the folder you are in"
        raise DeltaMemError(f"{path} is {kind}.", "It cannot be replaced as a whole.", "Choose a folder inside it.")
    if resolved.exists() and not overwrite and not (resolved.is_dir() and not any(resolved.iterdir())):
        raise DeltaMemError(
            f"{path} is already there.", "Nothing was written.", "Choose another folder, or pass --overwrite."
        )
    check_writable(path)


def check_writable(path: str | Path) -> None:
    """Raise if nothing can be written at `path`, whose missing parents would be created."""
    parent = next(parent for parent in resolve(path).parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "You may not write there" if parent.is_dir() else "It is not a folder"
        raise DeltaMemError(f"{path} cannot be written into {parent}.", f"{why}.", "Choose another place.")


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
