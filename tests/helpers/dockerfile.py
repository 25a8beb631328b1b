"""Parse a Dockerfile into stages and steps. Instructions that ours does not use raise."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

KNOWN = set("ARG CMD COPY ENTRYPOINT ENV LABEL RUN STOPSIGNAL USER VOLUME WORKDIR".split())


@dataclass(frozen=True)
class Step:
    word: str
    value: str

    def words(self, env: Mapping[str, str]) -> list[str]:
        """The arguments, from JSON or split as in a shell."""
        if self.value.startswith("["):
            return list(json.loads(self.value))
        return [expand(word, env) for word in shlex.split(self.value)]

    def pairs(self, env: Mapping[str, str]) -> dict[str, str]:
        """The names and values that `ENV`, `LABEL` or `ARG` sets."""
        return {name: value for name, _, value in (word.partition("=") for word in self.words(env))}


@dataclass(frozen=True)
class Copy:
    origin: str  # a stage's name; "" is the build context
    sources: tuple[str, ...]
    target: str


@dataclass
class Stage:
    name: str
    parent: str
    steps: list[Step] = field(default_factory=list)

    def last(self, word: str) -> Step:
        return [step for step in self.steps if step.word == word][-1]


def parse(text: str) -> list[Stage]:
    """
    Raises:
        ValueError: an instruction is unknown, or comes before the first FROM.
    """
    stages: list[Stage] = []
    for line in _logical_lines(text):
        word, _, value = line.partition(" ")
        word, value = word.upper(), value.strip()
        if word == "FROM":
            parent, *name = re.split(r"\s+[Aa][Ss]\s+", value)
            stages.append(Stage(*name or [""], parent))
        elif word in KNOWN and stages:
            stages[-1].steps.append(Step(word, value))
        else:
            raise ValueError(f"not known here: {line!r}")
    return stages


def environment(stages: Sequence[Stage], stage: Stage, base: Mapping[str, str]) -> dict[str, str]:
    """The environment variables at the end of a stage, including those of the base image."""
    parents = [parent for parent in stages if parent.name == stage.parent]
    env = environment(stages, parents[0], base) if parents else dict(base)
    for step in stage.steps:
        if step.word == "ENV":
            env |= step.pairs(env)
    return env


def copy_of(step: Step, env: Mapping[str, str]) -> Copy:
    """
    Raises:
        ValueError: an option other than --from.
    """
    words = step.words(env)
    options = [word for word in words if word.startswith("--")]
    *sources, target = words[len(options) :]
    if any(not option.startswith("--from=") for option in options):
        raise ValueError(f"not known here: COPY {step.value}")
    return Copy(options[0].partition("=")[2] if options else "", tuple(sources), target)


def expand(text: str, env: Mapping[str, str]) -> str:
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda match: env[match[1] or match[2]], text)


def ignored(path: str, patterns: Sequence[str]) -> bool:
    """Whether a .dockerignore excludes `path`. The last pattern that matches it or a parent folder decides."""
    parts = path.split("/")
    paths = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    left_out = False
    for pattern in patterns:
        if any(re.fullmatch(_regex(pattern.removeprefix("!")), above) for above in paths):
            left_out = not pattern.startswith("!")
    return left_out


def ignore_patterns(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _regex(pattern: str) -> str:
    pieces = re.split(r"(\*\*/|\*|\?)", pattern)
    meaning = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(meaning.get(piece) or re.escape(piece) for piece in pieces)


def _logical_lines(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return "\n".join(lines).replace("\\\n", "").splitlines()
