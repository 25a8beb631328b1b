"""What is wrong with the installed packages, in three lines, before anything runs.

The bounds are those of the package's own metadata (`pyproject.toml`): there is no second list of them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deltamem_tool.errors import InstallationError

PACKAGE = "deltamem-tool"
IGNORE = "DELTAMEM_IGNORE_BOUNDS"  # set to 1 to run with other versions
ONNX = ("onnx", "onnx-ir", "onnxruntime", "onnxscript")  # what only graphs need
# Distributions that all bring the one package `onnxruntime`.
RUNTIMES = (
    "onnxruntime",
    "onnxruntime-directml",
    "onnxruntime-gpu",
    "onnxruntime-migraphx",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
)


def check_installation(*names: str, without: Collection[str] = ()) -> None:
    """Check what is about to be used. With DELTAMEM_IGNORE_BOUNDS=1 nothing is checked.

    Args:
        names: required packages, as pip calls them; all of them if none is named. "onnxruntime" is any distribution of
            ONNX Runtime.
        without: packages that are not used, although none is named.

    Raises:
        InstallationError: a package is missing, its version is outside the bounds, PyTorch cannot be imported, or
            several distributions of ONNX Runtime are installed over each other.
    """
    if os.environ.get(IGNORE) == "1":
        return
    required: dict[str, Requirement] = {}
    for requirement in _required():
        name = str(canonicalize_name(requirement.name))
        required["onnxruntime" if name in RUNTIMES else name] = requirement
    used = {name: required[name] for name in (names or required) if name in required and name not in without}
    for name, requirement in used.items():
        if name == "onnxruntime":
            _check_runtime(requirement)
        else:
            _check_version(requirement, name)
    if "torch" in used:
        _check_torch(used["torch"])  # last: it takes seconds


def _required() -> Iterator[Requirement]:
    """What the package requires on this machine, without extras; nothing where it runs without being installed."""
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _check_version(requirement: Requirement, name: str) -> None:
    found = _installed(name)
    if found is None:
        raise InstallationError(
            f"{name} is not installed.", "deltamem needs it.", f"pip install '{name}{_bounds(requirement)}'"
        )
    if requirement.specifier.contains(found, prereleases=True):
        return
    raise InstallationError(
        f"{name} {found} is installed, and this version of deltamem works with {_bounds(requirement)}.",
        "Other versions have other names for what it uses: it could fail midway, or compute something else.",
        f"pip install '{name}{_bounds(requirement)}', or set {IGNORE}=1 to try it as it is.",
    )


def _bounds(requirement: Requirement) -> str:
    """`>=5.23,<5.25`, the lower bound first."""
    return ",".join(sorted(map(str, requirement.specifier), key=lambda bound: not bound.startswith(">")))


def _check_runtime(requirement: Requirement) -> None:
    found = [name for name in RUNTIMES if _installed(name)]
    if len(found) > 1:
        names = " ".join(found)
        raise InstallationError(
            f"{' and '.join(found)} are installed over each other.",
            "They bring the same package, onnxruntime: its files are a mixture of both.",
            f"pip uninstall -y {names} && pip install '{requirement.name}{_bounds(requirement)}'",
        )
    # Any one of them will do.
    _check_version(requirement, found[0] if found else requirement.name)


def _check_torch(requirement: Requirement) -> None:
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InstallationError(
            "PyTorch is installed, but it cannot be imported.",
            f"{lines[0].rstrip('.')}.",
            f"pip install --force-reinstall 'torch{_bounds(requirement)}'",
        ) from error
