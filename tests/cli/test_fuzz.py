"""Random commands, options and invalid files: a result or a three-line error, never a traceback or a partial file.

`DELTAMEM_FUZZ_EXAMPLES=20000 pytest tests/cli/test_fuzz.py` tries this many command lines.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pkgutil
import shutil
import signal
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Any, NamedTuple

import click
import pytest
import transformers
from cli.fuzz_material import PLACES, SOUND, STDINS, cut_copies, right_files, special_files, wrong_files
from helpers.extras import lacks_extra
from helpers.publishing import adapter_folder
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import deltamem_tool
from deltamem_tool import cli
from deltamem_tool.cli import COMMANDS
from deltamem_tool.serve import server

EXAMPLES = int(os.environ.get("DELTAMEM_FUZZ_EXAMPLES", "250"))
# After this time, a command line counts as accepted. The command is interrupted, and must clean up.
SECONDS, LONG = 1.0, 15.0

NUMBERS = ["-1", "0", "1", "2", "7", "65", "1000000000000000000", "0.5", "-0.0", "1e400", "nan", "inf", "９", "0x10"]
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
]
WORDS += ["recall", "perplexity", "locomo", "lm_eval:arc", "window:0", "window:x", "kind=none", "nobody/nothing", "\n"]
WORDS += ["training.steps=2", "training.steps=nan", "memory.rank=2", "data.path=talks.jsonl", "data.path=fifo"]
WORDS += ["episodes=0", "🦜" * 200, "\ufeff", "\x1b[2J", "cpu", "cuda", "cuda:99", "1,2", "4"]
IMPORTED_LATE = ["bm25s", "datasets", "nltk.stem", "peft", "psutil", "rapidfuzz.distance", "rouge_score.rouge_scorer"]
IMPORTED_LATE += ["lm_eval.tasks", "rich.markdown", "tiktoken", "torch.utils.tensorboard"]
ENCODINGS = ["utf-8", "utf-8", "cp1252", "ascii"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    right_files(folder)
    right = frozenset(path.name for path in folder.iterdir())
    wrong_files(folder)
    cut_copies(folder)
    return folder, right


def values(parameter: click.Parameter, paths: list[str]) -> st.SearchStrategy[str]:
    """Words for an option or argument, half of them valid for its type."""
    text = st.sampled_from(WORDS) | st.text(max_size=8).filter(lambda word: "\0" not in word)
    path = st.sampled_from(paths)
    kind = parameter.type
    if isinstance(kind, click.Choice):
        return st.sampled_from([str(choice) for choice in kind.choices]) | text
    if isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
        return st.sampled_from(["1", "2", "3"]) | st.sampled_from(NUMBERS) | text
    if isinstance(kind, click.Path):
        return path
    return path | text


def parameters(name: str) -> list[click.Parameter]:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    return command.params


@st.composite
def given_words(draw: st.DrawFn, parameter: click.Parameter, paths: list[str]) -> list[str]:
    value = draw(values(parameter, paths))
    if not isinstance(parameter, click.Option):
        return [value]
    spelling = draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts]))
    if parameter.is_flag:
        return [spelling]
    return [f"{spelling}={value}"] if draw(st.booleans()) else [spelling, value]


@st.composite
def any_lines(draw: st.DrawFn, paths: list[str]) -> list[str]:
    name = draw(st.sampled_from([name for name in COMMANDS if name != "quickstart" or draw(st.integers(0, 9)) == 0]))
    words = [name]
    for parameter in parameters(name):
        required = parameter.required and draw(st.integers(0, 19)) > 0
        if not required and draw(st.integers(0, 5)) > 0:
            continue
        for _ in range(draw(st.integers(1, 2)) if parameter.multiple or parameter.nargs == -1 else 1):
            words += draw(given_words(parameter, paths))
    return words


@st.composite
def nearly_sound_lines(draw: st.DrawFn, paths: list[str]) -> list[str]:
    """A valid line with up to two changes: a word replaced or removed, or an option added."""
    words = draw(st.sampled_from(SOUND.strip().splitlines())).split()
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        at = draw(st.integers(1, len(words)))
        change = draw(st.sampled_from(["replace", "replace", "add", "leave out"]))
        if change == "add":
            words += draw(given_words(draw(st.sampled_from(parameters(words[0]))), paths))
        elif at < len(words):
            words[at : at + 1] = [draw(st.sampled_from(paths + NUMBERS + WORDS))] if change == "replace" else []
    return words


@dataclass(frozen=True)
class Case:
    """A command line with its environment."""

    words: list[str]
    stdin: bytes
    encoding: str
    is_patient: bool  # whether it may finish


def cases(paths: list[str]) -> st.SearchStrategy[Case]:
    lines = nearly_sound_lines(paths) | nearly_sound_lines(paths) | any_lines(paths)
    patience = st.integers(0, 24).map(lambda drawn: drawn == 0)
    return st.builds(Case, lines, st.sampled_from(STDINS), st.sampled_from(ENCODINGS), patience)


class _Enough(BaseException):
    """Raised after the command has started its work, in the place of Ctrl-C."""


class Ending(NamedTuple):
    """How a command ended."""

    code: Any  # None when it was interrupted
    out: str
    err: str


def run(case: Case, folder: Path) -> Ending:
    """Run a command in its own process, since an interrupt inside torch can leave torch broken."""
    interrupted, ending, failure = folder / "interrupted", folder / "ending", folder / "failure"
    for file in (interrupted, ending, failure):
        file.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        try:
            ending.write_text(json.dumps(run_here(case, interrupted)))
        except BaseException:
            failure.write_text(traceback.format_exc(), errors="backslashreplace")
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    if interrupted.exists() and not ending.exists():  # a library, such as torch.export, fails while cleaning up
        return Ending(None, "", "")
    assert not failure.exists(), failure.read_text()
    assert status == 0, f"ended by signal {status}"
    code, out, err = json.loads(ending.read_text())
    return Ending(None if interrupted.exists() else code, out, err)  # or what a library made of it


def run_here(case: Case, interrupted: Path) -> Ending:
    """Run a command, interrupt it after some time, and then create a file `interrupted`."""

    def enough(*_: Any) -> None:
        interrupted.touch()
        raise _Enough

    out = io.TextIOWrapper(io.BytesIO(), case.encoding)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    signal.signal(signal.SIGALRM, enough)
    server.run = enough  # a server that listens has started its work
    code: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        # Repeated, since an exception in a C callback is lost.
        signal.setitimer(signal.ITIMER_REAL, LONG if case.is_patient else SECONDS, LONG)
        try:
            cli.main()
        except SystemExit as ended:
            code = 0 if ended.code is None else ended.code
        except _Enough:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    for stream in (out, err):
        stream.flush()
    return Ending(code, *(stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)))  # type: ignore[attr-defined]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Files with their size and the time of the last change."""
    stats = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items() if not S_ISDIR(stat.st_mode)}


def check(case: Case, code: Any, out: str, err: str, before: dict[str, tuple[int, int]], here: Path) -> None:
    after = listing(here)
    assert code in (0, 1, 2, None), (code, err)
    assert "Traceback" not in out + err
    assert not [name for name in after if any(part.startswith(".") and part != ".cache" for part in name.split("/"))]
    named = " ".join(case.words) + case.stdin.decode("utf-8", "replace")
    named += " ".join(str(path.readlink()) for path in here.iterdir() if path.is_symlink() and path.name in named)
    untouched = {name for name in before if name.split("/")[0] not in named}
    assert {name: after.get(name) for name in untouched} == {name: before[name] for name in untouched}
    if code == 1 and case.words[0] != "chat":  # a chat continues, and reports what is wrong with each line
        assert "Error: " in err or "Aborted!" in err
    before_json = case.words[case.words.index("--json") - 1] if "--json" in case.words else "--"
    if code == 0 and not before_json.startswith("--") and not {"-h", "--help"} & set(case.words):
        json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    for name in after.keys() - before.keys():
        if name.endswith(".json") and case.words[0] not in ("run", "chat"):  # these write memories, under any name
            json.loads((here / name).read_text(encoding="utf-8"))


FROM_NPM = {"page"}  # its work needs npm packages; see tests/page


def import_everything() -> None:
    """Imported here, so that not every process has to."""
    for module in pkgutil.walk_packages(deltamem_tool.__path__, "deltamem_tool."):
        if not module.name.endswith(("__main__", "triton_scan")) and not lacks_extra(module.name):
            importlib.import_module(module.name)
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "Trainer", "PreTrainedModel"):
        getattr(transformers, name)


@pytest.mark.slow
@pytest.mark.timeout(300 + 2 * EXAMPLES)  # or a busy machine, or 20,000 lines, would exceed it
@pytest.mark.filterwarnings("ignore")  # an interrupted command closes nothing
def test_no_command_line_ends_in_a_traceback(material, tmp_path, monkeypatch, hub):
    source, right = material
    here = tmp_path / "here"
    paths = sorted(path.name for path in source.iterdir()) + PLACES
    paths += ["fifo", "unreadable.json", "unreadable.safetensors", "folder-unreadable"]
    hub.add_repo("someone/base", source / "base")
    hub.add_repo("someone/adapter", adapter_folder(tmp_path / "pushed", "someone/base", hub.head("someone/base")))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    endings = tmp_path / "endings"
    endings.mkdir()
    import_everything()

    def no_traceback(case: Case) -> Ending:
        if here.exists():
            shutil.rmtree(here)
        here.mkdir()
        for path in source.iterdir():
            if path.name in right or path.name in " ".join(case.words):
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, here / path.name, **({"symlinks": True} if path.is_dir() else {"follow_symlinks": False}))
        special_files(here)
        monkeypatch.chdir(here)
        monkeypatch.setattr(sys, "argv", ["deltamem", *case.words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(case.stdin), "utf-8"))
        before = listing(here)
        ending = run(case, endings)
        check(case, *ending, before, here)
        return ending

    ends: Counter[str] = Counter()

    @seed(0)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(paths))
    def any_case(case: Case) -> None:
        code = no_traceback(case).code
        ends[f"{case.words[0]}: {'interrupted' if code is None else code}"] += 1

    any_case()
    print(json.dumps(ends, indent=1, sort_keys=True))
    sound = {words[0]: words for words in map(str.split, reversed(SOUND.strip().splitlines()))}
    assert sound.keys() == set(COMMANDS) - FROM_NPM
    for words in sound.values():  # the unchanged lines start their work
        ending = no_traceback(Case(words, b"", "utf-8", is_patient=False))
        assert ending.code in (0, None), (words, ending.err)
