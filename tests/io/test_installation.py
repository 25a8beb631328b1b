"""Problems of installed packages are reported before anything runs, and stop only commands that need them.

Other versions are simulated by files that come before the real ones on the path, as pip would leave them.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli.command import Done, in_a_process
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from deltamem_tool.errors import InstallationError
from deltamem_tool.io import installation
from deltamem_tool.io.installation import IGNORE, OPTIONAL, PACKAGE, check_installation


def installed(folder: Path, name: str, version: str) -> None:
    """Write the metadata of a package of this version."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def front_folder(tmp_path, monkeypatch):
    """A folder that comes before the installed packages on the path, and in which commands run."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def process(tmp_path):
    """`process(*arguments)` runs `deltamem` with `tmp_path` before the installed packages on the path."""

    def run(*arguments: object, **variables: str) -> Done:
        env = {**os.environ, "PYTHONPATH": str(tmp_path), **variables}
        return in_a_process(*arguments, cwd=tmp_path, env=env)

    return run


ROOT = Path(__file__).parents[2]


def declared() -> list[Requirement]:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != PACKAGE]


BOUNDS = {each.name: installation._bounds(each) for each in declared()}
NEEDS_EVERYTHING = [
    "train recipe.yaml",
    "patch base --out fresh",
    "eval builtin:adapter",
    "export builtin:adapter --out x",
]


@pytest.mark.parametrize("version", ["5.22.0", "5.25.0", "6.0.0.dev0"])
@pytest.mark.parametrize("words", NEEDS_EVERYTHING[:2])
def test_an_unsupported_transformers_version_raises(front_folder, deltamem, words, version):
    installed(front_folder, "transformers", version)
    bounds = BOUNDS["transformers"]
    deltamem(*words.split()).assert_short_error(
        f"transformers {version} is installed", f"pip install 'transformers{bounds}'", IGNORE, code=1
    )


@pytest.mark.parametrize("words", NEEDS_EVERYTHING)
def test_an_unsupported_package_version_raises(front_folder, deltamem, words):
    installed(front_folder, "numpy", "1.26.0")
    bounds = BOUNDS["numpy"]
    deltamem(*words.split()).assert_short_error("numpy 1.26.0 is installed", f"pip install 'numpy{bounds}'", code=1)


def test_commands_that_do_not_need_the_package_work(process, tmp_path):
    installed(tmp_path, "transformers", "5.22.0")
    for words in ("--help", "train --help", "inspect builtin:adapter", "architectures qwen3"):
        result = process(*words.split())
        assert result.code == 0 and result.out and "5.22.0" not in result.err, words
    # An ONNX folder needs only ONNX Runtime, so the error is about the missing folder.
    process("run", tmp_path, "--prompt", "Hello").assert_short_error("ONNX folder", code=1)
    process("chat", "builtin:adapter").assert_short_error("transformers 5.22.0 is installed", code=1)


def test_the_bounds_can_be_ignored(process, tmp_path):
    installed(tmp_path, "numpy", "1.26.0")
    result = process("train", "recipe.yaml", **{IGNORE: "1"})
    result.assert_short_error("recipe.yaml", code=1)
    assert "numpy" not in result.err


@pytest.mark.slow
def test_two_installed_runtimes_raise(process, tmp_path):
    runtimes = [name for name in ("onnxruntime", "onnxruntime-gpu") if installation._installed_version(name)]
    assert len(runtimes) == 1, "these tests run where one is installed"
    other = ({"onnxruntime", "onnxruntime-gpu"} - set(runtimes)).pop()
    installed(tmp_path, other, "1.31.0")
    for words in ("run folder --prompt Hello", "export builtin:adapter --out x"):
        process(*words.split()).assert_short_error(
            "onnxruntime and onnxruntime-gpu are installed together",
            "pip uninstall -y onnxruntime onnxruntime-gpu",
            code=1,
        )
    # Training uses neither.
    process("train", "recipe.yaml").assert_short_error("recipe.yaml", code=1)
    result = process("run", "folder", "--prompt", "Hello", **{IGNORE: "1"})
    assert "installed together" not in result.err


def test_a_broken_torch_is_reported(process, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file: No such file or directory')"
    )
    process("train", "recipe.yaml").assert_short_error(
        "PyTorch is installed, but it cannot be imported", "libcudart.so.13", "--force-reinstall 'torch>=2.11", code=1
    )
    result = process("inspect", "builtin:adapter", "--help")
    assert result.code == 0


def test_the_library_raises_the_same_error(tmp_path):
    installed(tmp_path, "transformers", "5.22.0")
    code = "import deltamem_tool\ntry: deltamem_tool.attach\nexcept ImportError as error: print(error)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("transformers 5.22.0 is installed")
    code = "from deltamem_tool import DeltaMemConfig, DeltaMemError; print(DeltaMemConfig().rank)"
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout == "8\n"


def without(monkeypatch, *names: str) -> None:
    """Pretend that these packages are not installed."""
    own = installation._installed_version
    monkeypatch.setattr(installation, "_installed_version", lambda name: None if name in names else own(name))


def test_a_missing_extra_is_named(monkeypatch):
    without(monkeypatch, "torch", "transformers", "accelerate", "datasets")
    with pytest.raises(InstallationError) as raised:
        check_installation("train")
    assert raised.value.what == "This needs torch, transformers, accelerate and 1 more, which are not installed."
    assert raised.value.why == "They come with the extra 'train' of deltamem-tool."
    assert raised.value.next == "pip install 'deltamem-tool[train]'"
    check_installation()
    check_installation("cpu")
    without(monkeypatch, "click")
    with pytest.raises(InstallationError, match=r"(?s)This needs click, which is not.*comes with deltamem-tool"):
        check_installation("cpu")


def test_packages_needed_only_by_some_options_may_be_missing(monkeypatch):
    without(monkeypatch, *OPTIONAL)
    check_installation("train", "eval")
    assert {each.name for each in declared()} >= OPTIONAL


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_a_missing_runtime_is_named(monkeypatch, extra):
    without(monkeypatch, *installation.RUNTIMES)
    with pytest.raises(InstallationError, match=r"(?s)ONNX Runtime, which is not.*deltamem-tool\[cpu\]"):
        check_installation(extra)


@pytest.mark.parametrize("runtime", installation.RUNTIMES)
def test_any_single_runtime_is_accepted(monkeypatch, runtime):
    own, versions = installation._installed_version, {runtime: "1.31.1"}
    monkeypatch.setattr(
        installation,
        "_installed_version",
        lambda name: versions.get(name) if name in installation.RUNTIMES else own(name),
    )
    check_installation("cpu")
    versions[runtime] = "1.99.0"
    with pytest.raises(InstallationError, match=f"{runtime} 1.99.0 is installed"):
        check_installation("cpu")


def test_every_extra_is_installed_here():
    check_installation("cpu", "torch", "export", "train", "eval")


def test_an_uninstalled_source_tree_has_no_bounds(monkeypatch):
    def missing(name):
        raise installation.PackageNotFoundError(name)

    monkeypatch.setattr(installation, "requires", missing)
    monkeypatch.setattr(installation, "_installed_version", lambda name: None)
    check_installation("train", "cpu")


# The sets that are tested


def pins(file: str) -> dict[str, list[Requirement]]:
    """The pins by name. A name may have pins for several versions of Python or several systems."""
    requirements: dict[str, list[Requirement]] = {}
    for line in (ROOT / file).read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            requirements.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return requirements


WITHOUT = {"constraints.txt": set(), "constraints-lowest.txt": {"ray"}}  # see scripts/constraints.sh


@pytest.mark.parametrize("file", WITHOUT)
def test_every_requirement_is_pinned_within_its_bounds(file):
    pinned = pins(file)
    names = {each: canonicalize_name(each.name) for each in declared()}
    assert WITHOUT[file] == set(names.values()) - pinned.keys(), "stale: make constraints"
    for requirement, name in names.items():
        if name in WITHOUT[file]:
            continue
        for pin in pinned[name]:
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and requirement.specifier.contains(specifier.version), f"{pin} in {file}"


def test_every_requirement_has_an_upper_bound():
    assert all(any(bound.operator == "<" for bound in each.specifier) for each in declared())


def test_packages_with_borrowed_names_are_bounded_at_the_next_minor_version():
    reached = {"transformers", "torch", "onnxscript", "onnxruntime", "onnxruntime-gpu", "huggingface-hub"}
    newest = {
        name: max(Version(pin.version) for each in requirements for pin in each.specifier)
        for name, requirements in pins("constraints.txt").items()
    }
    for requirement in declared():
        if requirement.name in reached:
            (upper,) = (Version(bound.version) for bound in requirement.specifier if bound.operator == "<")
            tested = newest[requirement.name]
            assert upper == Version(f"{tested.major}.{tested.minor + 1}"), requirement
