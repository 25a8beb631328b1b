"""The `docker` lines of a document, parsed as in a shell, and run in a root folder."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from helpers.clean_root import Image, run

SWITCHES = {"--rm", "-i", "-t", "-it"}
VALUED = {"--entrypoint", "--gpus", "--user", "-e", "-v"}
# Prints the arguments and the piped input, in the place of `docker`.
SHOW_WORDS = r"""
docker() { printf '%s\0' "$@"; printf '\1'; if [ -p /dev/stdin ]; then cat; fi; printf '\2'; }
id() { echo 4321; }
"""
SOMEBODY = 4321  # neither the image's user nor root


@dataclass(frozen=True)
class Docker:
    line: str
    words: tuple[str, ...]
    stdin: str
    answer: str  # the comment after it

    @property
    def build_args(self) -> dict[str, str]:
        named = [word for before, word in zip(self.words, self.words[1:], strict=False) if before == "--build-arg"]
        return {name: value for name, _, value in (word.partition("=") for word in named)}


@dataclass
class DockerRun:
    switches: set[str] = field(default_factory=set)
    options: list[tuple[str, str]] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)

    def values(self, name: str) -> list[str]:
        return [value for option, value in self.options if option == name]


def docker_lines(text: str, folder: Path) -> list[Docker]:
    """Every line of a ```bash block that calls docker, for a user whose working folder is `folder`."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    lines = [line for line in blocks.splitlines() if re.search(r"(^|\| )docker ", line)]
    return [docker for line in lines for docker in _words(line, folder)]


def parse_run(docker: Docker, image: str) -> DockerRun:
    """
    Raises:
        ValueError: it is not a `docker run` of that image, or has an unknown option.
    """
    command, *words = docker.words
    parsed = DockerRun()
    while words and words[0] != image:
        word = words.pop(0)
        if word in SWITCHES:
            parsed.switches.add(word)
        elif word in VALUED and words:
            parsed.options.append((word, words.pop(0)))
        else:
            raise ValueError(f"not known here: {word} in {docker.line}")
    if command != "run" or not words:
        raise ValueError(f"not known here: {docker.line}")
    parsed.arguments = words[1:]
    return parsed


def run_line(image: Image, docker: Docker, name: str) -> subprocess.CompletedProcess[str]:
    """Runs the line. Unlike a real container, `image` keeps what is written outside the mounts."""
    parsed = parse_run(docker, name)
    pairs = [value.partition(":") for value in parsed.values("-v")]
    mounts = {target: Path(source) for source, _, target in pairs}  # only folders: named volumes need the Hub
    words = [*image.entrypoint, *(parsed.arguments or image.command)]
    user = (parsed.values("--user") or [None])[0]
    return run(image, words, user=user, mounts=mounts, stdin=docker.stdin)


def _words(line: str, folder: Path) -> list[Docker]:
    shown = subprocess.run(
        ["bash", "-c", SHOW_WORDS + line], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    calls = [call.partition("\1") for call in shown.stdout.split("\2")[:-1]]
    answer = line.partition("   # ")[2].strip()
    return [Docker(line, tuple(words.split("\0")[:-1]), stdin, answer) for words, _, stdin in calls]
