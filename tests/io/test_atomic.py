"""Atomic writing of files and folders, and the attributes of existing ones that are kept."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.clean_root import why_not
from helpers.tiny import listing

from deltamem_tool.errors import ConfigError, DeltaMemError, domain_error
from deltamem_tool.io.atomic import atomic_folder, check_overwrite, check_writable, resolve, write_atomically

# A program that writes half of the folder in its argument.
WRITING = """
import sys, time
from deltamem_tool.io.atomic import atomic_folder

with atomic_folder(sys.argv[1]) as staged:
    (staged / "half").write_text("written")
    print("writing", flush=True)
    time.sleep(60)
"""
OTHER = 12345  # a user id that belongs to nobody
needs_root = pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root gives files away")


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_are_followed(tmp_path, overwrite):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert resolve(tmp_path / "link" / "new") == (tmp_path / "real" / "new").resolve()
    with atomic_folder(tmp_path / "link", overwrite=overwrite) as staged:
        (staged / "file").write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_text() == "x"


def _write_folder(path):
    with atomic_folder(path, overwrite=True):
        raise AssertionError("there is nowhere to write")


@pytest.mark.parametrize("write", [lambda path: check_overwrite(path, True), check_writable, _write_folder])
def test_circular_links_raise(tmp_path, write):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(DeltaMemError, match="form a loop"):
        write(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# Attributes of files


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_file_keeps_its_mode_and_gets_a_new_time(tmp_path, mode):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    file.chmod(mode)
    os.utime(file, (0, 0))
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new" and stat.S_IMODE(file.stat().st_mode) == mode
    assert file.stat().st_mtime > 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_new_file_has_the_default_mode(tmp_path):
    write_atomically(tmp_path / "file", b"new")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("there", [True, False])
def test_writing_through_a_link_keeps_the_link(tmp_path, there):
    (tmp_path / "vault").mkdir()
    target, link = tmp_path / "vault" / "file", tmp_path / "link"
    if there:
        target.write_bytes(b"old")
    link.symlink_to("vault/file")
    write_atomically(link, b"new")
    assert link.is_symlink() and not target.is_symlink() and target.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "link", "vault"]


def test_hard_links_are_kept(tmp_path):
    (tmp_path / "one").write_bytes(b"old and longer")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    write_atomically(tmp_path / "one", b"new")
    assert (tmp_path / "one").samefile(tmp_path / "two") and (tmp_path / "two").read_bytes() == b"new"


@needs_root
def test_the_owner_is_kept(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_bytes(b"old")
    folder.mkdir(mode=0o750)
    for path in (file, folder):
        os.chown(path, OTHER, OTHER)
    write_atomically(file, b"new")
    with atomic_folder(folder, overwrite=True) as staged:
        (staged / "file").write_bytes(b"new")
    assert [(path.stat().st_uid, path.stat().st_gid) for path in (file, folder)] == [(OTHER, OTHER)] * 2
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


@needs_root
def test_a_file_of_another_user_is_written_in_place_or_raises(public_folder):
    """Covers a user who may write the file but not its folder, and one who may write the folder but not the file."""
    ours, theirs = public_folder / "ours", public_folder / "theirs"
    ours.write_bytes(b"old and longer")
    ours.chmod(0o666)
    theirs.write_bytes(b"old")
    with _as_user(OTHER):
        check_writable(ours)
        write_atomically(ours, b"new")
        with pytest.raises(DeltaMemError, match="read-only"):
            check_writable(theirs)
        with pytest.raises(PermissionError):
            write_atomically(theirs, b"new")
    assert ours.read_bytes() == b"new" and ours.stat().st_uid == 0
    public_folder.chmod(0o777)
    with _as_user(OTHER):
        with pytest.raises(PermissionError):  # a rename would ignore the file's permissions
            write_atomically(theirs, b"new")
        write_atomically(ours, b"newer")
    assert theirs.read_bytes() == b"old"
    assert ours.read_bytes() == b"newer" and ours.stat().st_uid == 0
    assert sorted(listing(public_folder)) == ["ours", "theirs"]


@pytest.mark.parametrize("error", [errno.EBUSY, errno.EACCES])
def test_a_file_that_cannot_be_renamed_is_written_in_place(tmp_path, monkeypatch, error):
    file = tmp_path / "file"
    file.write_bytes(b"old and longer")
    inode = file.stat().st_ino
    monkeypatch.setattr(Path, "replace", _raises(OSError(error, "no rename")))
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new" and file.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OSError, match="no rename"):  # there is no file to write into
        write_atomically(tmp_path / "other", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@needs_root
def test_a_mount_point_is_written_in_place(tmp_path):
    if why := why_not():
        pytest.skip(why)
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "mounted").write_bytes(b"")
    program = "from deltamem_tool.io.atomic import write_atomically; write_atomically('mounted', b'new')"
    script = f'mount --bind real mounted && "$0" -c "{program}"'
    subprocess.run(["unshare", "--mount", "sh", "-c", script, sys.executable], cwd=tmp_path, check=True)
    assert (tmp_path / "real").read_bytes() == b"new" and (tmp_path / "mounted").read_bytes() == b""


def test_a_full_disk_keeps_the_file_when_writing_in_place(tmp_path, monkeypatch):
    (tmp_path / "one").write_bytes(b"old")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "full")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_atomically(tmp_path / "one", b"new and longer")
    assert (tmp_path / "two").read_bytes() == b"old"


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(tmp_path / "pipe", b"new")
        assert os.read(reader, 10) == b"new"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(OSError, match="pipe") as nobody_reads:
        write_atomically(tmp_path / "pipe", b"new")
    assert "cannot be read or written" in str(domain_error(nobody_reads.value))
    program = (
        "from deltamem_tool.io.atomic import *; check_writable('/dev/stdout'); write_atomically('/dev/stdout', b'new')"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"new"


# Leftovers of killed programs


def test_leftovers_of_a_killed_program_are_removed_on_the_next_write(tmp_path):
    """The leftovers of a program that is still writing and files with similar names are kept."""
    killed = subprocess.Popen([sys.executable, "-c", WRITING, tmp_path / "onnx"], stdout=subprocess.PIPE)
    assert killed.stdout is not None and killed.stdout.readline()
    killed.kill()
    killed.communicate()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".onnx.") and (left / "half").exists()
    (tmp_path / ".onnx.backup-1").mkdir()
    with atomic_folder(tmp_path / "other"):
        assert left.exists()
    with atomic_folder(tmp_path / "onnx") as first:
        assert not left.exists()
        with atomic_folder(tmp_path / "onnx", overwrite=True) as second:
            assert first.is_dir() and second.is_dir()
        (tmp_path / "onnx").rmdir()
    assert {path.name for path in tmp_path.iterdir()} == {"onnx", "other", ".onnx.backup-1"}


# Folders created or replaced in the meantime


@pytest.mark.parametrize("there_before", [True, False])
def test_a_folder_created_meanwhile_is_kept_and_the_result_gets_another_name(tmp_path, there_before):
    if there_before:  # empty, as it was created
        (tmp_path / "onnx").mkdir()

    def write():
        with atomic_folder(tmp_path / "onnx") as staged:
            (staged / "result").write_text("ours")
            (tmp_path / "onnx").mkdir(exist_ok=True)
            (tmp_path / "onnx" / "thesis").write_text("theirs")

    with pytest.raises(DeltaMemError, match=r"onnx was created while this command was running\.[\s\S]*onnx-2"):
        write()
    assert sorted(path for path in listing(tmp_path) if not path.endswith("/")) == ["onnx-2/result", "onnx/thesis"]


def test_a_folder_exchanged_meanwhile_is_not_replaced(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "result").write_text("of before")

    def write():
        with atomic_folder(tmp_path / "onnx", overwrite=True) as staged:
            (staged / "result").write_text("ours")
            (tmp_path / "onnx").rename(tmp_path / "moved")
            (tmp_path / "onnx").mkdir()
            (tmp_path / "onnx" / "thesis").write_text("theirs")

    with pytest.raises(DeltaMemError, match=r"onnx was created while this command was running\.[\s\S]*onnx-2"):
        write()
    assert (tmp_path / "onnx" / "thesis").exists() and (tmp_path / "onnx-2" / "result").read_text() == "ours"


def test_files_in_a_replaced_folder_keep_their_mode(tmp_path):
    (tmp_path / "onnx" / "inside").mkdir(parents=True)
    for name in ("private", "inside/private"):
        (tmp_path / "onnx" / name).write_text("of before")
        (tmp_path / "onnx" / name).chmod(0o600)
    with atomic_folder(tmp_path / "onnx", overwrite=True) as staged:
        (staged / "inside").mkdir()
        for name in ("private", "inside/private", "new"):
            (staged / name).write_text("ours")
    modes = [stat.S_IMODE((tmp_path / "onnx" / name).stat().st_mode) for name in ("private", "inside/private", "new")]
    assert modes == [0o600, 0o600, 0o666 & ~umask()] and (tmp_path / "onnx" / "private").read_text() == "ours"


def test_an_empty_folder_is_replaced_and_keeps_its_mode(tmp_path):
    (tmp_path / "onnx").mkdir(mode=0o700)
    with atomic_folder(tmp_path / "onnx") as staged:
        (staged / "result").write_text("ours")
    assert stat.S_IMODE((tmp_path / "onnx").stat().st_mode) == 0o700 and sorted(listing(tmp_path)) == [
        "onnx/",
        "onnx/result",
    ]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_never_replaces_a_file(tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("theirs")
    with pytest.raises(DeltaMemError, match="It is a file, not a folder"):
        check_overwrite(tmp_path / "thesis.txt", overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "theirs"


# The home folder


def test_a_tilde_in_an_output_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_atomically("~/file", b"new")
    with atomic_folder("~/folder") as staged:
        (staged / "result").write_text("ours")
    assert sorted(listing(tmp_path)) == ["file", "folder/", "folder/result"]
    with pytest.raises(ConfigError, match="~nobody-here/file is not a valid path"):
        check_writable("~nobody-here/file")


@pytest.fixture
def public_folder():
    """A folder that every user may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _raises(error):
    def call(*_):
        raise error

    return call


@contextmanager
def _as_user(number):
    os.setresgid(number, number, 0)
    os.setresuid(number, number, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
