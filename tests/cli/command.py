"""Run `deltamem` as a user does: through its entry point, with its own error handling."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from deltamem_tool import cli

# What the console script does. One test calls the script itself by its name.
START = [sys.executable, "-c", "from deltamem_tool.cli import main; main()"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    def assert_short_error(self, *words: str, code: int | tuple[int, ...] = (1, 2)) -> None:
        """Check for a few lines on stderr that contain `words`, no traceback, and nothing on stdout."""
        codes = (code,) if isinstance(code, int) else code
        assert self.code in codes, f"exit code {self.code}\n{self.err}"
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert 1 <= len(lines) <= 4, self.err
        for word in words:
            assert word in self.err, f"{word!r} is not in:\n{self.err}"
        assert self.out == ""


@pytest.fixture
def deltamem(capfd, monkeypatch):
    """`deltamem(*arguments)` in this process: an error that is not caught at the boundary is raised here."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["deltamem", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return Done(ended.value.code or 0, out, err)

    return run


def in_a_process(*arguments: object, cwd: Path, **options) -> Done:
    result = subprocess.run(
        [*START, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=240, check=False, **options
    )
    return Done(result.returncode, result.stdout, result.stderr)
