"""Any command, any options, files of every wrong sort: an answer or three lines, never a traceback or half a file.

`DELTAMEM_FUZZ_EXAMPLES=20000 pytest tests/cli/test_fuzz.py` tries as many command lines instead of the usual number.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pkgutil
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import transformers
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import deltamem_tool
from deltamem_tool import cli
from deltamem_tool.cli import COMMANDS

EXAMPLES = int(os.environ.get("DELTAMEM_FUZZ_EXAMPLES", "500"))
SECONDS = 1.5  # a command line that is still at work then was understood; it is interrupted, and must clean up

NUMBERS = [
    "-1",
    "0",
    "1",
    "2",
    "7",
    "65",
    "1000000000000000000",
    "0.5",
    "-0.0",
    "1e400",
    "nan",
    "inf",
    "",
    "９",
    "0x10",
]
WORDS = [
    "",
    " ",
    "a",
    "q,o",
    "q,q",
    "x,y",
    "a=b",
    "facts=[1",
    "facts=1e9",
    "=",
    "--",
    "-",
    "None",
    "true",
    "ß",
    "\udcff",
    "\n",
]
WORDS += [
    "recall",
    "perplexity",
    "locomo",
    "lm_eval:arc",
    "window:0",
    "window:x",
    "kind=none",
    "nobody/nothing",
    "🦜" * 200,
]


def wrong_files(folder: Path) -> None:
    """Files and folders that are not what a command expects."""
    randomness = random.Random(0)
    contents = {
        "empty": b"",
        "random.bin": randomness.randbytes(3000),
        "text.txt": b"My dog is called Rex.\n",
        "latin1.yaml": "base: caf\xe9\n".encode("latin-1"),
        "bom.json": b"\xef\xbb\xbf{}",
        "list.json": b"[1, 2]",
        "deep.json": b"[" * 20000,
        "nan.json": b'{"a": NaN}',
        "surrogate.jsonl": b'{"messages": [{"role": "user", "content": "\\ud800"}]}\n',
        "roles.jsonl": b'{"messages": [{"role": "nobody", "content": 3}]}\n{"messages": {}}\n',
        "alias.yaml": b"a: &a [x, x]\nb: &b [*a, *a]\nbase: *b\n",
        "recipe.yaml": b"base: missing\nout: adapter-out\n",
        "keys.yaml": b"base: base\nout: adapter-out\nmemory: {rank: -1, colour: red}\n",
        "null.yaml": b"base:\nout:\n",
        "python.yaml": b"!!python/object/apply:os.system ['true']\n",
        "short.safetensors": b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
        "header.safetensors": b"\x02\0\0\0\0\0\0\0{}",
        "folder-config/adapter_config.json": b"{}",
        "folder-config/deltamem_config.json": b'{"format": 99}',
        "folder-onnx/model.onnx": b"\x08\x07garbage",
        "folder-onnx/deltamem.json": b'{"format": 1}',
        "folder-eval/evaluation.json": b'{"format": 1, "rows": "many"}',
        "folder-eval/records.jsonl": b"{\n",
        "folder-base/config.json": b'{"model_type": "llama", "hidden_size": "wide"}',
        "folder-base/model.safetensors": b"\0" * 40,
        "folder-strange/config.json": b'{"model_type": "no_such_type", "architectures": ["X"]}',
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "folder-empty").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")


def cut_copies(folder: Path) -> None:
    """The shipped adapter, and copies with one file cut in the middle or without it."""
    assets = Path(cli.__file__).parents[1] / "assets"
    source = next(path.parent for path in sorted(assets.rglob("*.safetensors")) if "adapter" in path.parent.name)
    shutil.copytree(source, folder / "adapter")
    for file in sorted(path for path in source.iterdir() if path.is_file()):
        shutil.copytree(source, folder / f"cut-{file.stem}")
        (folder / f"cut-{file.stem}" / file.name).write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        shutil.copytree(source, folder / f"without-{file.stem}")
        (folder / f"without-{file.stem}" / file.name).unlink()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    wrong_files(folder)
    cut_copies(folder)
    return folder


def values(parameter: click.Parameter, paths: list[str]) -> st.SearchStrategy[str]:
    """Words for an option or argument: what its type expects as often as what it does not."""
    text = st.sampled_from(WORDS) | st.text(max_size=8).filter(lambda word: "\0" not in word)
    path = st.sampled_from(paths)
    kind = parameter.type
    if isinstance(kind, click.Choice):
        return st.sampled_from([str(choice) for choice in kind.choices]) | text
    if isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
        return st.sampled_from(NUMBERS) | text
    if isinstance(kind, click.Path):
        return path
    return path | text


@st.composite
def command_lines(draw: st.DrawFn, paths: list[str]) -> list[str]:
    name = draw(st.sampled_from([name for name in COMMANDS if name != "quickstart" or draw(st.integers(0, 9)) == 0]))
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    words = [name]
    for parameter in command.params:
        required = parameter.required and draw(st.integers(0, 19)) > 0
        if not required and draw(st.integers(0, 5)) > 0:
            continue
        for _ in range(draw(st.integers(1, 2)) if parameter.multiple or parameter.nargs == -1 else 1):
            value = draw(values(parameter, paths))
            if isinstance(parameter, click.Option):
                spelling = draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts]))
                words += [spelling] if parameter.is_flag else [spelling, value]
            else:
                words.append(value)
    return words


class _Enough(BaseException):
    """The command is at work: what comes now is a person's Ctrl-C."""


def run(words: list[str]) -> tuple[int | None, str]:
    """The exit code, None when it was interrupted, and what was printed."""

    def enough(*_: Any) -> None:
        raise _Enough

    printed = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="surrogateescape")
    before = signal.signal(signal.SIGALRM, enough)
    code: int | None = None
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                cli.main()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0
            except _Enough:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    printed.flush()
    return code, printed.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]


def half_written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".cache")


def import_everything() -> None:
    """An interrupted import leaves half a library behind, for all that come after it."""
    for module in pkgutil.walk_packages(deltamem_tool.__path__, "deltamem_tool."):
        if not module.name.endswith(("__main__", "triton_scan")):
            importlib.import_module(module.name)
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "Trainer", "PreTrainedModel"):
        getattr(transformers, name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # an interrupted command closes nothing
def test_no_command_line_ends_in_a_traceback(material, tmp_path, monkeypatch):
    here = tmp_path / "here"
    paths = sorted(path.name for path in material.iterdir())
    paths += [f"{name}/x" for name in ("new", "text.txt")] + ["new", "", ".", "folder-empty/", "n\new", "ü" * 300]
    paths += [
        "folder-onnx/model.onnx",
        "builtin:adapter",
        "builtin:nothing",
        "nobody/nothing",
        "a/b/c",
        "https://x.invalid/y",
    ]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    interrupted: list[str] = []
    import_everything()

    @seed(0)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(words=command_lines(paths))
    def no_traceback(words: list[str]) -> None:
        if here.exists():
            shutil.rmtree(here)
        shutil.copytree(material, here, symlinks=True)
        monkeypatch.chdir(here)
        monkeypatch.setattr(sys, "argv", ["deltamem", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n/help\n/undo\n/save x\n"), "utf-8"))
        code, printed = run(words)
        if code is None:
            interrupted.append(words[0])
        else:
            assert code in (0, 1, 2), (code, printed)
        assert "Traceback" not in printed
        assert not half_written(here)

    no_traceback()
    print(json.dumps({name: interrupted.count(name) for name in sorted(set(interrupted))}))
