"""Run a Dockerfile's steps in folders that become roots, without a container engine. Needs Linux and root."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from helpers.dockerfile import Copy, Stage, copy_of, expand, ignore_patterns, ignored

SHELL = ["/bin/sh", "-c"]
DEVICES = {name: Path(name) for name in ("/dev", "/proc", "/sys")}
NETWORK = {name: Path(name) for name in ("/etc/hosts", "/etc/resolv.conf")}  # a container engine provides these, too
TIMEOUT = 1800


@dataclass
class Image:
    root: Path
    env: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)
    borrowed: dict[str, Path] = field(default_factory=dict)  # read-only mounts, which are not part of the image

    def path(self, inside: str) -> Path:
        """The path of a file as seen from outside. Relative paths start at the working folder."""
        return self.root / os.path.normpath(os.path.join(self.folder, inside)).lstrip("/")


def why_not() -> str:
    """The reason why no root can be entered here, or ""."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("unshare"):
        return "a clean root needs Linux and its root user"
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    return f"mounts are not allowed here: {tried.stderr.strip()}" if tried.returncode else ""


def run(
    image: Image,
    words: Sequence[str],
    *,
    user: str | None = None,
    env: Mapping[str, str] | None = None,
    mounts: Mapping[str, Path] | None = None,
    read_only: Mapping[str, Path] | None = None,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run a command in the image's root, with its user, folder and environment, and nothing from this process.

    Mounts exist only for this command.
    """
    lent = {**NETWORK, **image.borrowed, **(read_only or {})}
    script = ["set -e"]
    for target, source in {**DEVICES, **lent, **(mounts or {})}.items():
        at = image.root / target.lstrip("/")
        _make_mount_point(at, source)
        script.append(f"mount --rbind {shlex.quote(str(source))} {shlex.quote(str(at))}")
        if target in lent:
            script.append(f"mount -o remount,bind,ro {shlex.quote(str(at))}")
    inside = ["env", "-i", "-C", image.folder]
    inside += [f"{name}={value}" for name, value in {"HOME": "/root", **image.env, **(env or {})}.items()]
    entered = ["chroot", f"--userspec={user or image.user}", "--groups=", str(image.root), *inside, *words]
    script.append("exec " + shlex.join(entered))
    command = ["unshare", "--mount", "--propagation", "private", *SHELL, "\n".join(script)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT)


@dataclass
class Builder:
    """
    Args:
        context: the folder that is sent to the build, without the files that its .dockerignore excludes.
        folder: the folder for the roots.
        base: fills an empty folder with the image that `FROM` names.
        build_args: as `--build-arg`.
        build_env: more variables for RUN steps, such as proxy settings, which are not part of the image.
        build_read_only: mounts for RUN steps.
        after_run: called with the image after each RUN step.
    """

    context: Path
    folder: Path
    base: Callable[[str, Path], Image]
    build_args: Mapping[str, str] = field(default_factory=dict)
    build_env: Mapping[str, str] = field(default_factory=dict)
    build_read_only: Mapping[str, Path] = field(default_factory=dict)
    after_run: Callable[[Image], None] = lambda image: None
    made: dict[str, Image] = field(default_factory=dict)

    def build(self, stages: Sequence[Stage]) -> Image:
        """Build all stages, and return the last one. The others are in `made`."""
        for stage in stages:
            image = self.made[stage.name] = self._start(stage)
            args: dict[str, str] = {}
            for step in stage.steps:
                known = {**args, **image.env}
                match step.word:
                    case "ARG":
                        args |= {name: self.build_args.get(name, value) for name, value in step.pairs(known).items()}
                    case "ENV":
                        image.env |= step.pairs(known)
                    case "RUN":
                        self._run(image, step.value, args)
                    case "COPY":
                        self._copy(image, copy_of(step, known))
                    case "WORKDIR":
                        image.folder = os.path.join(image.folder, expand(step.value, known))
                        image.path(".").mkdir(parents=True, exist_ok=True)
                    case "USER":
                        image.user = step.value
                    case "VOLUME":
                        image.volumes += step.words(known)
                    case "ENTRYPOINT":
                        image.entrypoint = step.words(known)
                    case "CMD":
                        image.command = step.words(known)
        return image

    def _start(self, stage: Stage) -> Image:
        root = self.folder / (stage.name or "final")
        if stage.parent not in self.made:
            return self.base(stage.parent, root)
        parent = self.made[stage.parent]
        _copy_tree(parent.root, root)
        return Image(**{**deepcopy(vars(parent)), "root": root})

    def _run(self, image: Image, script: str, args: Mapping[str, str]) -> None:
        env = {**args, **self.build_env}
        result = run(image, [*SHELL, script], env=env, read_only=self.build_read_only)
        assert result.returncode == 0, f"RUN {script}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        self.after_run(image)

    def _copy(self, image: Image, copy: Copy) -> None:
        into = copy.target.endswith(("/", ".")) or len(copy.sources) > 1
        for name in copy.sources:
            if copy.origin:
                source = self.made[copy.origin].path(name)
            else:
                source = self._sent(name)
            target = image.path(copy.target)
            _copy_tree(source, target / source.name if into and source.is_file() else target)

    def _sent(self, name: str) -> Path:
        """The files below `name` that are sent to a build."""
        for file in sent(self.context, name):
            at = self.folder / "context" / file.relative_to(self.context)
            at.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, at)
        return self.folder / "context" / name


def sent(context: Path, name: str) -> list[Path]:
    """The files of `name`, a file or a folder, that are sent to a build."""
    patterns = ignore_patterns((context / ".dockerignore").read_text(encoding="utf-8"))
    paths = [context / name, *(context / name).rglob("*")]
    return [file for file in paths if file.is_file() and not ignored(file.relative_to(context).as_posix(), patterns)]


def _copy_tree(source: Path, target: Path) -> None:
    """Copy a folder's content into the target folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", "-T", source, target], check=True)


def _make_mount_point(at: Path, source: Path) -> None:
    if source.is_dir():
        at.mkdir(parents=True, exist_ok=True)
    elif not at.exists():
        at.parent.mkdir(parents=True, exist_ok=True)
        at.touch()
