"""Write files and folders atomically: they appear whole or not at all."""

from __future__ import annotations

import errno
import glob
import itertools
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path

from deltamem_tool.errors import DeltaMemError
from deltamem_tool.io.names import expand_user

UNFINISHED = ".unfinished"  # ends the name of a folder that is being written


@contextmanager
def file_lock(path: str | Path) -> Iterator[None]:
    """Wait until no other program has locked `path`, and lock it. Without effect if the file system has no locks.

    The lock is on the folder, because each `write_atomically` replaces the file itself.
    """
    folder = resolve(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with suppress(OSError, ImportError):  # Windows has no fcntl
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Lock an existing `folder` while the block runs. Without effect if the file system has no locks.

    Raises:
        DeltaMemError: another program has locked it.
    """
    with ExitStack() as stack:
        try:
            stack.callback(os.close, _try_lock(folder))
        except BlockingIOError as error:
            raise DeltaMemError(
                f"Another program is writing to {folder}.",
                "Nothing was changed.",
                "Wait until it is done, or choose another folder.",
            ) from error
        except (OSError, ImportError):  # Windows has no fcntl
            pass
        yield


def _try_lock(folder: Path) -> int:
    """Lock `folder` without waiting. The lock lasts until the returned descriptor is closed.

    Raises:
        BlockingIOError: another program has locked it.
        OSError, ImportError: the file system, or Windows, has no locks.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


# Errors for a file that a rename cannot replace: its folder is read-only, or the file is a mount point.
_NOT_BESIDE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write to a temporary file beside `path`, flush it to disk, and rename it to `path`.

    An existing file keeps its mode and owner. If `path` is a symbolic link, its target is written. Files that a rename
    would break are written in place: a file with several hard links, a mount point, a file in a read-only folder, a
    device or a pipe.

    Raises:
        OSError: the folder or the file cannot be written, or the disk is full. An existing file is unchanged, unless it
            is written in place.
    """
    path = resolve(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    former = path.stat() if path.exists() else None
    if former is not None and not os.access(path, os.W_OK):  # a rename would ignore that
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    if former is not None and (former.st_nlink > 1 or not stat.S_ISREG(former.st_mode)):
        _write_in_place(path, content)
        return
    try:
        _write_beside(path, content, former)
    except OSError as error:
        if former is None or error.errno not in _NOT_BESIDE:
            raise
        _write_in_place(path, content)


def _write_beside(path: Path, content: bytes, former: os.stat_result | None) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path.name))
    staged = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if former is None:
            staged.chmod(0o666 & ~_umask())  # mkstemp creates files that only their owner can read
        else:
            _keep_attributes(path, former, staged)
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def _write_in_place(path: Path, content: bytes) -> None:
    """Write into the file itself. If that fails, restore its content."""
    if not path.is_file():
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # a pipe that nobody reads is an error, not a wait
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "wb") as device:
            device.write(content)
        return
    former = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        try:
            _fill(file, content)
        except BaseException:
            _fill(file, former)
            raise


def _fill(file: FileIO, content: bytes) -> None:
    file.seek(0)
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
    file.truncate()
    os.fsync(file.fileno())


def _keep_attributes(path: Path, former: os.stat_result, staged: Path) -> None:
    """Give `staged` the owner, the mode and the extended attributes of `path`, which it will replace.

    Raises:
        PermissionError: `path` has another owner, and this process may not change owners.
    """
    if (former.st_uid, former.st_gid) != (staged.stat().st_uid, staged.stat().st_gid):
        os.chown(staged, former.st_uid, former.st_gid)
    shutil.copystat(path, staged)
    os.utime(staged)


def _keep_attributes_of_former(path: Path, staged: Path) -> None:
    """Call `_keep_attributes` if `path` exists and has the same kind. Another owner is only kept if permitted."""
    if path.exists() and path.is_dir() == staged.is_dir():
        with suppress(PermissionError):
            _keep_attributes(path, path.stat(), staged)


def resolve(path: str | Path) -> Path:
    """Make a path absolute and follow its symbolic links; a leading `~` is the home folder.

    Raises:
        DeltaMemError: the links form a loop.
        ConfigError: `~USER` names an unknown user.
    """
    path = expand_user(path)
    resolved = Path(os.path.realpath(path))
    if not resolved.exists() and path.exists():  # /dev/stdout: the link of a pipe names no file
        return path
    if resolved.is_symlink():
        raise DeltaMemError(
            f"{path} cannot be resolved.", "Its symbolic links form a loop.", "Choose another path, or fix the links."
        )
    return resolved


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a staging folder beside `path`. It is renamed to `path` if the block succeeds, and removed otherwise.

    An existing folder and its files keep their mode and owner. Staging folders of programs that were killed while they
    wrote the same folder are removed.

    Raises:
        DeltaMemError: raised by `check_overwrite`; or `path` was created while the block ran.
    """
    check_overwrite(path, overwrite)
    path = resolve(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    former = _identity(path)
    _remove_unfinished(path)
    with _staging(path) as staged:
        yield staged
        for file in staged.rglob("*"):
            if file.is_file():
                _sync(file)
                _keep_attributes_of_former(path / file.relative_to(staged), file)
        staged.chmod(0o777 & ~_umask())
        _keep_attributes_of_former(path, staged)
        if overwrite and former is not None and _identity(path) == former:
            _swap(staged, path)
        else:
            _name(staged, path)


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path`, locked if the file system has locks. It is removed if the block fails."""
    with ExitStack() as stack:
        staged = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path.name)))
        try:
            with suppress(OSError, ImportError):
                stack.callback(os.close, _try_lock(staged))
                staged = staged.rename(f"{staged}{UNFINISHED}")  # after locking, so that no program removes it as left
            yield staged
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise


def _remove_unfinished(path: Path) -> None:
    """Remove staging folders of `path` whose programs were killed: they are no longer locked."""
    for left in path.parent.glob(f"{glob.escape(_prefix(path.name))}*{UNFINISHED}"):
        with suppress(OSError, ImportError):
            descriptor = _try_lock(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)


def is_unfinished(name: str, of: Collection[str]) -> bool:
    """Return whether a killed program left a file or folder `name` when it wrote one of the names `of` beside it."""
    return name.startswith(tuple(map(_prefix, of)))


def _prefix(name: str) -> str:
    """The beginning of the name of all that is written before it gets its own `name`."""
    return f".{name}."


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode, which distinguish `path` from a later file of the same name; None if it does not exist."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_dev, status.st_ino


def _swap(staged: Path, path: Path) -> None:
    """Replace `path` by `staged`. The old folder is renamed first and restored on failure: not all systems can swap."""
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path.name)))
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


def _name(staged: Path, path: Path) -> None:
    """Rename `staged` to `path`, unless another program has created `path` and it is not an empty folder.

    Raises:
        DeltaMemError: `path` is taken. The result is kept under another name beside it: it may be the work of hours.
    """
    try:
        os.rename(staged, path)
    except OSError as error:
        if not os.path.lexists(path):
            raise
        beside = free_name(path)
        os.rename(staged, beside)
        raise path_taken_error(path, beside) from error


def path_taken_error(path: Path, beside: Path) -> DeltaMemError:
    """The error for a `path` that another program created meanwhile, so that the result is in `beside` instead."""
    return DeltaMemError(
        f"{path} was created while this command was running.",
        f"It was not changed, and the result is in {beside}.",
        "Rename one of them.",
    )


def free_name(path: Path, suffix: str = "") -> Path:
    """A free name beside `path`: onnx-2, or me-2.safetensors with a `suffix`."""
    stem = path.name.removesuffix(suffix)
    names = (path.with_name(f"{stem}-{number}{suffix}") for number in itertools.count(2))
    return next(name for name in names if not os.path.lexists(name))


def check_overwrite(path: str | Path, overwrite: bool) -> None:
    """Raise if writing the folder `path` would fail or destroy something. Call this before long work begins.

    Raises:
        DeltaMemError: `path` exists, is not an empty folder, and `overwrite` is false; or it is a file, or cannot be
            replaced; or nothing can be written beside it.
    """
    resolved = resolve(path)
    if Path.cwd().is_relative_to(resolved) or resolved.is_mount():
        kind = "a mount point" if resolved.is_mount() else "the folder you are in"
        raise DeltaMemError(f"{path} is {kind}.", "It cannot be replaced.", "Choose a folder inside it.")
    if resolved.exists() and not resolved.is_dir():
        raise DeltaMemError(f"{path} already exists.", "It is a file, not a folder.", "Choose another name.")
    if not overwrite and not is_free(resolved):
        raise DeltaMemError(
            f"{path} already exists.", "Nothing was written.", "Choose another folder, or pass --overwrite."
        )
    check_writable(path)


def is_free(path: Path) -> bool:
    """Return whether `path` does not exist or is an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def check_writable(path: str | Path) -> None:
    """Raise if nothing can be written at `path`. Missing parent folders would be created.

    Raises:
        DeltaMemError: the file at `path` or its folder is read-only.
        ConfigError: `~USER` names an unknown user.
    """
    resolved = resolve(path)
    if resolved.exists() and not resolved.is_dir():
        if not os.access(resolved, os.W_OK):
            raise DeltaMemError(f"{path} cannot be written.", "It is read-only.", "Choose another file.")
        return
    parent = next(parent for parent in resolved.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "You do not have permission to write there" if parent.is_dir() else "It is not a folder"
        raise DeltaMemError(f"{path} cannot be created in {parent}.", f"{why}.", "Choose another place.")


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
