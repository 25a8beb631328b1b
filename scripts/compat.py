"""Run the smoke tests with the newest releases of deltamem's dependencies, ignoring its upper bounds.

    make compat

Each package whose newest release differs from the tested one (constraints.txt) is installed alone into the tested set,
and at the end all of them together. Each set is an environment in a temporary folder, and nothing else is changed. This
takes a few minutes and gigabytes. A failure does not mean that this repository is broken: a dependency has changed. The
exit code is 1 if anything failed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PACKAGE = "deltamem-tool"
EXTRA = "all"
TESTS = ("pytest", "pytest-timeout", "pytest-xdist")
TOGETHER = "all of them"
LINES = 12  # number of lines of a failure's output to show


class Environment:
    """A virtual environment with the tested set and the package in it."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        with tempfile.TemporaryDirectory() as copy:  # building creates folders
            tree = Path(copy) / "tree"
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
            self.must("-c", str(ROOT / "constraints.txt"), f"{tree}[{EXTRA}]", *TESTS)
        self.tested = self.frozen()

    def install(self, *arguments: str) -> str:
        """Install packages, and return pip's output if it failed, or else ""."""
        command = [str(self.python), "-m", "pip", "install", "--quiet", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        return "" if done.returncode == 0 else done.stderr

    def must(self, *arguments: str) -> None:
        """Install packages, and exit if it fails."""
        why = self.install(*arguments)
        if why:
            sys.exit(f"pip cannot install the tested set:\n{why}")

    def frozen(self) -> dict[str, str]:
        """Return versions by name."""
        command = [str(self.python), "-m", "pip", "list", "--format", "json"]
        rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return {canonicalize_name(row["name"]): row["version"] for row in rows}

    def restore(self) -> None:
        """Restore the tested set."""
        extra = self.frozen().keys() - self.tested.keys()
        if extra:
            subprocess.run([str(self.python), "-m", "pip", "uninstall", "--quiet", "--yes", *extra], check=True)
        pins = [f"{name}=={version}" for name, version in self.tested.items() if name != PACKAGE]
        self.must("--no-deps", *pins)

    def smoke(self) -> str:
        """Run the smoke tests, and return their last lines if they failed, or else ""."""
        path = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "DELTAMEM_IGNORE_BOUNDS": "1"}
        done = subprocess.run([ROOT / "scripts" / "smoke.sh"], env=env, capture_output=True, text=True)
        return "" if done.returncode == 0 else "\n".join((done.stdout + done.stderr).splitlines()[-LINES:])


def required() -> list[str]:
    """Return the package's dependencies on this machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, None] = {}

    def add(lines: Sequence[str]) -> None:
        for each in map(Requirement, lines):
            if each.name == PACKAGE:
                for extra in each.extras:
                    add(project["optional-dependencies"][extra])
            elif each.marker is None or each.marker.evaluate():
                found[canonicalize_name(each.name)] = None

    add([*project["dependencies"], f"{PACKAGE}[{EXTRA}]"])
    return sorted(found)


def newest(environment: Environment, names: Sequence[str]) -> dict[str, str]:
    """Return the newest release of each package that pip finds for this machine."""
    command = [str(environment.python), "-m", "pip", "list", "--outdated", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {canonicalize_name(row["name"]): row["latest_version"] for row in json.loads(done.stdout)}
    return {name: found.get(name, environment.tested[name]) for name in names}


def main() -> None:
    console, failures = Console(), {}
    table = Table("package", "tested", "newest", "passed", title="deltamem with the newest releases")
    with tempfile.TemporaryDirectory() as folder, console.status("Installing the tested set") as status:
        environment = Environment(Path(folder) / "environment")
        names = required()
        latest = newest(environment, names)
        changed = [name for name in names if latest[name] != environment.tested[name]]
        passed = {}
        together = [TOGETHER] if len(changed) > 1 else []
        for name in [*changed, *together]:
            picked = changed if name == TOGETHER else [name]
            status.update(f"Trying {name}")
            failures[name] = environment.install(*(f"{each}=={latest[each]}" for each in picked)) or environment.smoke()
            passed[name] = "no" if failures[name] else "yes"
            environment.restore()
    for name in names:
        table.add_row(name, environment.tested[name], latest[name], passed.get(name, "is the tested one"))
    if TOGETHER in passed:
        table.add_section()
        table.add_row(TOGETHER, "", "", passed[TOGETHER])
    console.print(table)
    for name, why in failures.items():
        if why:
            console.print(f"\n{name}:", style="bold")
            console.print(why, markup=False, highlight=False)
    sys.exit(any(failures.values()))


if __name__ == "__main__":
    main()
