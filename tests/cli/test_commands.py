"""The commands on a tiny model, from a checkpoint to an evaluated adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, fields

import click
import pytest
import torch
import yaml
from cli.command import Done
from helpers.tiny import listing

from deltamem_tool import DeltaMemConfig, MemoryCache, __version__, cli, load
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.errors import DataError, ExportError
from deltamem_tool.evaluation import MEMORY_ONLY, RECALL, runner
from deltamem_tool.evaluation.conditions import EvalProtocol, conditions_of

HELP_SECONDS = 1.0  # of CPU


def succeeded(result: Done) -> str:
    assert result.code == 0, result.err
    assert "Traceback" not in result.err and "Warning" not in result.err
    return result.out


def test_patch_inspect_train_eval(working_folder, deltamem, checkpoint):
    patched = json.loads(succeeded(deltamem("patch", checkpoint, "--out", "adapter", "--rank", 4, "--json")))
    assert set(listing(working_folder)) == {"adapter/", "adapter/deltamem_config.json", "adapter/deltamem.safetensors"}
    assert patched["base"]["name"] == str(checkpoint)

    report = json.loads(succeeded(deltamem("inspect", "adapter", "--json")))
    assert report["parameters"] == patched["parameters"] == read_adapter("adapter").num_parameters()
    assert report["mechanism"]["rank"] == 4 and report["layers"] == [0, 1] and report["memory_bytes"] == 2 * 4 * 4 * 4

    recipe = {"base": str(checkpoint), "out": "trained", "adapter": "adapter", "data": {"facts_last": 2}}
    recipe["training"] = {"steps": 3, "batch_size": 2}
    (working_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    trained = json.loads(succeeded(deltamem("train", "recipe.yaml", "--set", "training.steps=2", "--json")))
    assert trained["steps"] == 2 and trained["adapter"] == "trained" and len(trained["losses"]) == 2

    options = ("--set", "facts=[1,2]", "--set", "episodes=4", "--plot", "plot.png", "--json")
    figures = json.loads(succeeded(deltamem("eval", "trained", *options)))
    assert figures["groups"] == ["1 fact", "2 facts"] and figures["questions"] == [4, 4]
    assert set(figures["scores"]) == {condition.name for condition in conditions_of(EvalProtocol.parse("memory"))}
    assert (working_folder / "plot.png").read_bytes().startswith(b"\x89PNG")

    cache = MemoryCache(model := load("trained"))
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), cache=cache)
    cache.memory.save("memory")
    report = json.loads(succeeded(deltamem("inspect", "memory", "--json")))
    assert (
        report["kind"] == "memory"
        and report["bytes"] == cache.memory.nbytes
        and report["adapter"] == cache.memory.adapter
    )


def test_the_output_for_people(working_folder, deltamem, checkpoint):
    output = succeeded(deltamem("patch", checkpoint, "--out", "adapter", "--branches", "q,k,v,o", "--layers", "1"))
    assert "parameters in adapter" in output and "Next: deltamem inspect adapter" in output
    output = succeeded(deltamem("inspect", "adapter"))
    assert "mechanism.rank" in output and "qwen3" in output
    output = succeeded(deltamem("eval", "adapter", "--set", "facts=[1]", "--set", "episodes=3"))
    of_one_layer = conditions_of(EvalProtocol.parse("memory"), can_permute=False)
    conditions = [condition.name.replace("_", " ") for condition in of_one_layer]
    assert all(condition in output for condition in conditions) and "3 histories are too few for a test" in output


def test_the_model_is_evaluated_on_the_requested_device(working_folder, deltamem, checkpoint, monkeypatch):
    succeeded(deltamem("patch", checkpoint, "--out", "adapter"))
    devices = []

    def stub(model, *_, **__):
        devices.append(model.device.type)
        raise DataError("Seen.")

    monkeypatch.setattr(runner, "evaluate", stub)
    for options in (("--device", "meta"), ("--device", "cpu"), ()):
        deltamem("eval", "adapter", "--set", "facts=[1]", *options).assert_short_error("Seen.", code=1)
    assert devices == ["meta", "cpu", "cuda" if torch.cuda.is_available() else "cpu"]


def test_export_uses_the_requested_target(working_folder, deltamem, checkpoint, monkeypatch):
    from deltamem_tool.onnx.export import export

    def stub(*args, target, max_length, **options):
        raise ExportError(f"for {target}, {max_length} tokens")

    monkeypatch.setattr(export, "export_onnx", stub)
    succeeded(deltamem("patch", checkpoint, "--out", "adapter"))
    for options, expected in (
        ((), "cpu, 0 tokens"),
        (("--target", "portable"), "portable, 0 tokens"),
        (("--max-length", "128"), "cpu, 128 tokens"),
    ):
        deltamem("export", "adapter", "--out", "onnx", *options).assert_short_error(f"for {expected}", code=1)
    deltamem("export", "adapter", "--out", "onnx", "--max-length", "63").assert_short_error("63", code=2)
    deltamem("export", "adapter", "--out", "onnx", "--target", "toaster").assert_short_error("toaster", code=2)


def test_defaults_match_the_library():
    from deltamem_tool.chat.sampling import MAX_NEW_TOKENS, Sampling
    from deltamem_tool.onnx import contract

    def defaults(name):
        return {option.name: option.default for option in cli.cli.get_command(None, name).params}

    for name, value in asdict(DeltaMemConfig()).items():
        assert defaults("patch")[name] == (",".join(value) if isinstance(value, tuple) else value)
    assert (defaults("eval")["task"], defaults("eval")["protocol"]) == (RECALL, MEMORY_ONLY)
    assert defaults("export")["logits"] in contract.LOGITS
    assert defaults("run")["max_new_tokens"] == MAX_NEW_TOKENS
    for name, argument in (("run", ["x", "--prompt", "x"]), ("chat", ["x"])):
        with cli.cli.get_command(None, name).make_context(name, argument) as context:
            assert Sampling(**{field.name: context.params[field.name] for field in fields(Sampling)}) == Sampling()


def test_patching_depends_only_on_the_seed(working_folder, deltamem, checkpoint):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        succeeded(deltamem("patch", checkpoint, "--out", name, "--seed", seed))
    a, b, c = ((working_folder / name / "deltamem.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    succeeded(deltamem("patch", checkpoint, "--out", "c", "--seed", 1, "--overwrite"))
    assert (working_folder / "c" / "deltamem.safetensors").read_bytes() == a


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_help_text(deltamem, command):
    output = succeeded(deltamem(command, "--help"))
    assert output.startswith(f"Usage: deltamem {command}")
    options = [option for option in cli.cli.get_command(None, command).params if isinstance(option, click.Option)]
    assert [option.opts[-1] for option in options if not option.help] == [], "options without a word of help"


def test_an_unknown_command_gives_a_suggestion(deltamem):
    deltamem("evaluate", "x").assert_short_error("No such command 'evaluate'", "Did you mean 'eval'?", code=2)


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from deltamem_tool.cli import main; sys.argv = ['deltamem', '--help']\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "import resource; used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime)\n"
        "print(*sys.modules)\n"
        "import deltamem_tool.evaluation.report.compare, deltamem_tool.evaluation.scoring.digits\n"  # no page
        "print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *help_lines, seconds, modules, comparing = result.stdout.splitlines()
    assert all(any(line.strip().startswith(name) for line in help_lines) for name in cli.COMMANDS)
    assert not [line for line in help_lines[1:] if line.endswith("...")], "a line is cut"
    assert not [name for name in modules.split() if name.startswith("deltamem_tool.chat")], "a command is imported"
    assert not {"torch", "transformers", "onnxruntime", "onnx", "huggingface_hub", "matplotlib"} & set(modules.split())
    assert not {"torch", "transformers", "matplotlib", "jinja2"} & set(comparing.split())
    assert float(seconds) < HELP_SECONDS


def test_the_installed_command_runs():
    from pathlib import Path

    script = Path(sys.executable).parent / "deltamem"
    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == __version__
