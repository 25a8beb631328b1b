"""Report problems with the installed packages in three lines, before anything runs.

The requirements and their bounds come from the package's own metadata (`pyproject.toml`); there is no second list.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deltamem_tool.errors import InstallationError, first_line

PACKAGE = "deltamem-tool"
IGNORE = "DELTAMEM_IGNORE_BOUNDS"  # set to 1 to run with whatever is installed
RUNTIME = "cpu"  # the extra with ONNX Runtime; any other distribution of ONNX Runtime can replace it
# Distributions that all provide the package `onnxruntime`.
RUNTIMES = (
    "onnxruntime",
    "onnxruntime-directml",
    "onnxruntime-gpu",
    "onnxruntime-migraphx",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
)
# Packages that only some options of an extra need. If one is missing, the option that needs it says so.
OPTIONAL = {"bitsandbytes", "bm25s", "nltk", "peft", "psutil", "rapidfuzz", "rouge-score", "tensorboard", "tiktoken"}


def check_installation(*extras: str) -> None:
    """Check the packages that every part of deltamem needs, and those of `extras`. DELTAMEM_IGNORE_BOUNDS=1 skips it.

    Args:
        extras: of `pyproject.toml`; `RUNTIME` is any distribution of ONNX Runtime.

    Raises:
        InstallationError: packages are missing, a version is outside the bounds, PyTorch cannot be imported, or several
            distributions of ONNX Runtime are installed over each other.
    """
    if os.environ.get(IGNORE) == "1":
        return
    for extra in ("", *extras):
        required = {str(canonicalize_name(each.name)): each for each in _requirements(extra)}
        runtime = next((required.pop(name) for name in RUNTIMES if name in required), None)
        missing = [name for name in required if _installed_version(name) is None and name not in OPTIONAL]
        if missing:
            raise _missing_error(missing, extra)
        for name, requirement in required.items():
            _check_version(requirement, name)
        if runtime is not None:
            _check_runtime(runtime)
        if "torch" in required:
            _check_torch(required["torch"])  # last: it takes seconds


def is_installed(*extras: str) -> bool:
    """Return whether `check_installation` finds no problem."""
    try:
        check_installation(*extras)
    except InstallationError:
        return False
    return True


def _requirements(extra: str) -> Iterator[Requirement]:
    """Yield the requirements that `extra` adds on this machine, or for "" those of every installation.

    Yields nothing if the package runs without being installed.
    """
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if always != (extra == "") or not (always or requirement.marker.evaluate({"extra": extra})):  # type: ignore[union-attr]
            continue
        if canonicalize_name(requirement.name) == PACKAGE:
            for other in requirement.extras:
                yield from _requirements(other)
        else:
            yield requirement


def _installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _missing_error(names: list[str], extra: str) -> InstallationError:
    shown = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    return InstallationError(
        f"This needs {shown}, which {'are' if len(names) > 1 else 'is'} not installed.",
        f"{'They come' if len(names) > 1 else 'It comes'} with "
        + (f"the extra {extra!r} of {PACKAGE}." if extra else f"{PACKAGE}."),
        f"pip install '{PACKAGE}{f'[{extra}]' if extra else ''}'",
    )


def _check_version(requirement: Requirement, name: str) -> None:
    installed = _installed_version(name)
    if installed is None or requirement.specifier.contains(installed, prereleases=True):
        return
    raise InstallationError(
        f"{name} {installed} is installed, and this version of deltamem works with {_bounds(requirement)}.",
        "Other versions may have a different API: a command could fail midway, or compute something else.",
        f"pip install '{name}{_bounds(requirement)}', or set {IGNORE}=1 to use the installed version.",
    )


def _bounds(requirement: Requirement) -> str:
    """`>=5.23,<5.25`, the lower bound first."""
    return ",".join(sorted(map(str, requirement.specifier), key=lambda bound: not bound.startswith(">")))


def _check_runtime(requirement: Requirement) -> None:
    runtimes = [name for name in RUNTIMES if _installed_version(name)]
    if not runtimes:
        raise InstallationError(
            "This needs ONNX Runtime, which is not installed.",
            f"It comes with the extra 'cpu' of {PACKAGE}, or with 'gpu' for NVIDIA's GPUs.",
            f"pip install '{PACKAGE}[cpu]', or '{PACKAGE}[gpu]'",
        )
    if len(runtimes) > 1:
        raise InstallationError(
            f"{' and '.join(runtimes)} are installed together.",
            "They provide the same package, onnxruntime, and overwrite each other's files.",
            f"pip uninstall -y {' '.join(runtimes)} && pip install '{runtimes[0]}{_bounds(requirement)}'",
        )
    _check_version(requirement, runtimes[0])


def _check_torch(requirement: Requirement) -> None:
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        raise InstallationError(
            "PyTorch is installed, but it cannot be imported.",
            f"{first_line(error)}.",
            f"pip install --force-reinstall 'torch{_bounds(requirement)}'",
        ) from error
