"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def folder_whole(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A staging folder beside `path` that takes its name when the block ends well, and vanishes otherwise.

    Raises:
        DeltaMemError: `path` is there, is not an empty folder, and `overwrite` is false.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
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
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")) / "old"
            os.rename(path, aside)
            try:
                os.rename(staged, path)
            except BaseException:
                os.rename(aside, path)
                raise
            finally:
                shutil.rmtree(aside.parent, ignore_errors=True)
        else:
            os.rename(staged, path)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raise if writing the folder `path` would destroy something; call it before long work begins."""
    path = Path(path)
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise DeltaMemError(
            f"{path} is already there.", "Nothing was written.", "Choose another folder, or pass --overwrite."
        )


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
