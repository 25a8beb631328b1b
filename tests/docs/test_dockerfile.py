"""The Dockerfile's steps, in order, in clean roots, and the commands of docs/docker.md, run by a user other than root.

`DELTAMEM_IMAGE=1 pytest tests/docs/test_dockerfile.py -s` does it as an engine would (minutes, a network, mmdebstrap):
roots of Debian's packages, pip with this machine's settings, PyTorch for the CPU, then the quickstart and the chats of
the document. Otherwise the very same steps run in a root that borrows this machine's system and this environment's
packages, read only, with pip kept from any index: what the package requires must be here already, and deltamem itself
is built and installed like in the image. Only `deltamem --help` is asked of it then; other tests run the quickstart.
Neither has an engine, a registry or a GPU: the official Python image, its layers, VOLUME and STOPSIGNAL are taken on
trust.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import click
import pytest
from helpers.clean_root import Builder, Image, run, sent, why_not
from helpers.docker_commands import SOMEBODY, docker_lines, parse_run, run_line
from helpers.dockerfile import copy_of, environment, expand, ignore_patterns, ignored, parse
from helpers.image_bases import borrowed, debian, lend_packages, pip_settings, tag_of
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from deltamem_tool.cli import cli

if not shutil.which("bash"):
    pytest.skip("bash reads the documented commands", allow_module_level=True)

ROOT = Path(__file__).parents[2]
STAGES = parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))
FINAL = STAGES[-1]
ENV = environment(STAGES, FINAL, {"PATH": ""})
PATTERNS = ignore_patterns((ROOT / ".dockerignore").read_text(encoding="utf-8"))
TEXTS = [(ROOT / name).read_text(encoding="utf-8") for name in ("docs/docker.md", "README.md")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NAME = "deltamem"  # the image's
WHOLE = os.environ.get("DELTAMEM_IMAGE") == "1"
NO_INDEX = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # to pip, 0 means no build isolation
SECRETS = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")
# As the image's user: the code comes from the image, and only the right folders are writable.
LOOK = """
import importlib.util, os, sys
print(importlib.util.find_spec("deltamem_tool").origin, os.getuid())
print(*(os.access(folder, os.W_OK) for folder in (".", os.environ["HOME"], os.environ["HF_HOME"], sys.prefix)))
"""


def documented(folder=ROOT):
    return [docker for text in TEXTS for docker in docker_lines(text, folder)]


def context_copies():
    copies = [copy_of(step, ENV) for stage in STAGES for step in stage.steps if step.word == "COPY"]
    return [copy for copy in copies if not copy.origin]


def test_all_files_of_the_package_are_sent_and_copied():
    copied = {file for copy in context_copies() for name in copy.sources for file in sent(ROOT, name)}
    folders = [SETUPTOOLS["package-dir"].get(name, name.replace(".", "/")) for name in SETUPTOOLS["packages"]]
    needed = {ROOT / "pyproject.toml", ROOT / PROJECT["project"]["readme"]}
    for pattern in ("*.py", "*.yaml", "py.typed", "assets/**/*"):
        needed |= {file for folder in folders for file in (ROOT / folder).glob(pattern) if file.is_file()}
    assert needed <= copied
    assert all(sent(ROOT, name) for copy in context_copies() for name in copy.sources)


@pytest.mark.parametrize(
    "path", [".git/config", ".env", "deltamem_tool/.env", "docs/docker.md", "recipes/__pycache__/a"]
)
def test_only_files_of_the_package_are_sent(path):
    assert ignored(path, PATTERNS)


def test_the_last_stage_declares_user_volume_and_command():
    assert FINAL.last("ENTRYPOINT").words({}) == ["deltamem"] and FINAL.last("CMD").words({}) == ["--help"]
    assert int(FINAL.last("USER").value.partition(":")[0]) > 0
    assert ENV["HF_HOME"] in FINAL.last("VOLUME").words(ENV)
    assert ENV["NVIDIA_VISIBLE_DEVICES"] == "all" and "compute" in ENV["NVIDIA_DRIVER_CAPABILITIES"]


def test_no_secret_goes_into_the_image():
    steps = [step for stage in STAGES for step in stage.steps if step.word in ("ARG", "ENV")]
    names = {word.partition("=")[0] for step in steps for word in step.value.split()}
    assert not [name for name in names if any(secret in name for secret in SECRETS)]
    for docker in documented():  # `-e HF_TOKEN`, never with a value
        assert not any(word.startswith("HF_TOKEN=") for word in docker.words)


def test_the_python_of_the_image_is_supported():
    outside = {stage.parent for stage in STAGES} - {stage.name for stage in STAGES}
    assert [tag_of(name).minor in SpecifierSet(PROJECT["project"]["requires-python"]) for name in outside] == [True]


@pytest.mark.parametrize("docker", documented(), ids=lambda docker: docker.line[:60])
def test_documented_commands_exist(docker):
    if docker.words[0] == "build":
        declared = {name for stage in STAGES for step in stage.steps if step.word == "ARG" for name in step.pairs({})}
        assert set(docker.words[1:]) >= {"-t", NAME, "."} and set(docker.build_args) <= declared
        return
    expected = parse_run(docker, NAME)
    assert all(value.split(":")[1] in (FINAL.last("WORKDIR").value, "/huggingface") for value in expected.values("-v"))
    command = cli.get_command(click.Context(cli), expected.arguments[0])
    assert command is not None
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in expected.arguments if word.startswith("--")} <= known


def build(folder: Path) -> Image:
    """The image. The roots of other stages are removed."""
    args = [docker.build_args for docker in documented() if docker.words[0] == "build"]
    cpu = next(known for known in args if "TORCH_INDEX" in known)
    if WHOLE:
        env, files = pip_settings()
        builder = Builder(ROOT, folder, debian, cpu, env, files)
    else:
        builder = Builder(ROOT, folder, borrowed, cpu, NO_INDEX, after_run=lend_packages)
    image = builder.build(STAGES)
    for other in builder.made.values():
        if other is not image:
            shutil.rmtree(other.root)
    return image


def untested() -> list[str]:
    """The packages whose version here differs from the image's."""
    names = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    here = {distribution.name.lower(): distribution.version for distribution in distributions()}
    return [
        f"{pin.name} {here[pin.name]}"
        for pin in pins
        if pin.name in names & here.keys() and (pin.marker is None or pin.marker.evaluate())
        if not pin.specifier.contains(here[pin.name])
    ]


@pytest.fixture
def folder(tmp_path):
    """A folder that is removed at once, because the image takes gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.docker
@pytest.mark.timeout(3600 if WHOLE else 300)
def test_the_steps_build_a_working_image(folder):
    other = [] if WHOLE else untested()
    if other:
        pytest.skip(f"the image has what constraints.txt says, and this environment has other versions: {other[0]}")
    if why_not() or (WHOLE and not shutil.which("mmdebstrap")):
        pytest.skip(why_not() or "mmdebstrap is not installed")
    image = build(folder)
    assert_package_is_whole(image)
    assert_user_is_confined(image)
    result = run(image, [*image.entrypoint, *image.command])
    assert result.returncode == 0 and "quickstart" in result.stdout, result.stderr
    if WHOLE:
        print(subprocess.run(["du", "-sh", image.root], capture_output=True, text=True, check=True).stdout)
        assert not (image.root / "root" / ".cache").exists() and not list(image.root.glob("usr/bin/*gcc*"))
        assert_document_holds(image, folder / "somebody")


def assert_package_is_whole(image: Image):
    (installed,) = image.path(image.env["VIRTUAL_ENV"]).glob("lib/python*/site-packages/deltamem_tool")
    files = {file.relative_to(installed).as_posix() for file in installed.rglob("*") if file.is_file()}
    parts = {"deltamem_tool": "", "recipes": "recipes/", "web/src": "web/"}
    sources = [(at, ROOT / part, sent(ROOT, part)) for part, at in parts.items()]
    expected = {at + file.relative_to(folder).as_posix() for at, folder, sent_files in sources for file in sent_files}
    expected = {file for file in expected if not file.startswith("recipes/ablations/")}  # for a script in benchmarks/
    assert _without(".pyc", files) == _without(".md", expected)


def _without(ending: str, files: set[str]) -> set[str]:
    return {file for file in files if not file.endswith(ending)}


def assert_user_is_confined(image: Image):
    looked = run(image, ["python3", "-c", LOOK])
    where, user, *writable = looked.stdout.split()
    assert where.startswith(image.env["VIRTUAL_ENV"]) and user == "1000", looked.stderr
    assert writable == ["True", "True", "True", "False"]
    others = run(image, ["python3", "-c", LOOK], user=f"{SOMEBODY}:{SOMEBODY}")
    assert others.stdout.split()[2:] == writable, others.stderr


def assert_document_holds(image: Image, folder: Path):
    """Check the document's lines for the CPU, sequentially, in a user's folder."""
    folder.mkdir()
    os.chown(folder, SOMEBODY, SOMEBODY)
    lines = [line for line in docker_lines(TEXTS[0], folder) if line.words[0] == "run" and "--gpus" not in line.words]
    for line in lines:
        result = run_line(image, line, NAME)
        print(line.line, result.stdout, result.stderr, sep="\n")
        assert result.returncode == 0 and "Traceback" not in result.stderr
        assert not line.answer or result.stdout == f"{line.answer}\n"
    assert any(line.answer for line in lines) and (folder / "me.safetensors").stat().st_uid == SOMEBODY


def test_the_parser_reads_dockerfiles_like_docker():
    text = '# a\nFROM x:1 AS one\nENV A=1 \\\n  # between\n  B=$C\nFROM one\nCOPY --from=one /a b/\nCMD ["x", "y z"]\n'
    one, last = parse(text)
    assert (one.name, one.parent, last.name, last.parent) == ("one", "x:1", "", "one")
    assert one.steps[0].pairs({"C": "2 3"}) == {"A": "1", "B": "2 3"}
    assert copy_of(last.steps[0], {}).origin == "one" and last.steps[1].words({}) == ["x", "y z"]
    for unknown in ("ONBUILD RUN x", "COPY --chown=1 a b"):
        with pytest.raises(ValueError, match="not known here"):
            copy_of(parse(f"FROM x\n{unknown}\n")[0].steps[0], {})
    assert expand("${A}b$A", {"A": "1"}) == "1b1"
