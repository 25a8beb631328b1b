"""Invalid input: a short error with the next step, exit code 1 or 2, and no partial output."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cli.command import START
from helpers.full_disk import small_files
from helpers.tiny import listing, save_checkpoint, write_jsonl
from transformers import BertConfig, T5Config

from deltamem_tool import cli, load
from deltamem_tool.adapter import save as save_module
from deltamem_tool.data import dialogues
from deltamem_tool.data.dialogues import assistant, user

TALK = [user("My dog is called Rex."), assistant("Noted."), user("What is my dog called?"), assistant("Rex.")]


def config_only(folder: Path, model_type: str, architecture: str | None, **changes) -> Path:
    """A checkpoint that consists only of its config, which is enough to reject it."""
    configs = {"t5": T5Config, "bert": BertConfig}
    config = configs[model_type]().to_dict() if model_type in configs else {}
    config |= {"model_type": model_type, "architectures": [architecture] if architecture else None, **changes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_recipe(folder: Path, base: Path, **sections) -> Path:
    content = {
        "base": str(base),
        "out": str(folder / "adapter"),
        "memory": {"rank": 4, "state_heads": 2},
        "training": {"steps": 4, "batch_size": 2},
        "data": {"facts_first": 1, "facts_last": 2},
        **sections,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


# Names


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", ""),
        ("patch", "", "--out", "new"),
        ("patch", "builtin:backbone", "--out="),
        ("chat", "builtin:adapter", "--memory="),
        ("eval", "builtin:adapter", "--report="),
        ("pull", "someone/adapter", "--out", ""),
    ],
)
def test_an_empty_path_is_not_the_working_directory(working_folder, deltamem, arguments):
    deltamem(*arguments).assert_short_error("A path is empty", "variable", code=1)
    assert not listing(working_folder)


@pytest.mark.parametrize("options", [("--set", "seed=1"), ("--data", "a.json", "--set", "data=b.json")])
def test_an_option_of_a_task_given_twice_is_rejected(working_folder, deltamem, options):
    deltamem("eval", "builtin:adapter", *options).assert_short_error("--set", code=2)


def test_a_name_with_line_breaks_is_shown_in_one_line(working_folder, deltamem):
    result = deltamem("inspect", "no\nsuch\nfolder")
    result.assert_short_error("no\\nsuch\\nfolder")
    assert len(result.err.splitlines()) == 3


# Bases


@pytest.mark.parametrize(
    ("model_type", "architecture", "says"),
    [
        ("t5", "T5ForConditionalGeneration", ["t5", "not a causal language model", "such as Qwen3"]),
        ("bert", "BertForMaskedLM", ["bert", "not a causal language model", "BertForMaskedLM", "such as Qwen3"]),
        ("bert", "BertModel", ["bert", "BertModel", "such as Qwen3"]),
        ("qwen33", "Qwen33ForCausalLM", ["'qwen33'", "not known", "Similar ones are qwen3", "update transformers"]),
        ("xyzzy-9", None, ["'xyzzy-9'", "not known"]),
        ("gpt2", "GPT2LMHeadModel", ["no safetensors weights", "save_pretrained"]),
    ],
)
def test_an_unsupported_base_is_rejected(working_folder, deltamem, model_type, architecture, says):
    base = config_only(working_folder / "base", model_type, architecture)
    before = listing(working_folder)
    deltamem("patch", base, "--out", "adapter").assert_short_error(*says, code=1)
    recipe = write_recipe(working_folder, base)
    deltamem("train", recipe).assert_short_error(*says, code=1)
    recipe.unlink()
    assert listing(working_folder) == before


def test_a_model_without_attention_is_rejected(working_folder, deltamem):
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(working_folder / "base")
    before = listing(working_folder)
    result = deltamem("patch", "base", "--out", "adapter")
    result.assert_short_error("Mamba", "cannot have a memory", "softmax attention", "such as Qwen3", code=1)
    assert listing(working_folder) == before


def test_an_encoder_with_weights_is_rejected(working_folder, deltamem):
    from transformers import BertModel

    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        working_folder / "base"
    )
    before = listing(working_folder)
    deltamem("patch", "base", "--out", "adapter").assert_short_error("BertModel", "such as Qwen3", code=1)
    # and one whose config does not name its type
    config = json.loads((working_folder / "base" / "config.json").read_text())
    (working_folder / "base" / "config.json").write_text(json.dumps({**config, "architectures": None}))
    deltamem("patch", "base", "--out", "adapter").assert_short_error("is an encoder", "is_decoder", code=1)
    assert set(listing(working_folder)) == set(before)


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "no/where"])
def test_a_missing_folder_is_rejected(working_folder, deltamem, name):
    for arguments in (("patch", name, "--out", "adapter"), ("inspect", name), ("eval", name)):
        deltamem(*arguments).assert_short_error(name, code=1)
    assert listing(working_folder) == {}


def test_a_folder_that_is_not_a_checkpoint_is_rejected(working_folder, deltamem):
    (working_folder / "empty").mkdir()
    deltamem("patch", "empty", "--out", "adapter").assert_short_error("not a checkpoint", "config.json", code=1)
    deltamem("inspect", "empty").assert_short_error("not an adapter folder", "deltamem patch", code=1)
    deltamem("eval", "empty").assert_short_error("not an adapter folder", "deltamem patch", code=1)
    (working_folder / "empty" / "config.json").write_text("[]")
    deltamem("patch", "empty", "--out", "adapter").assert_short_error("not a checkpoint", code=1)
    assert set(listing(working_folder)) == {"empty/", "empty/config.json"}


def test_a_rank_larger_than_the_hidden_size_is_rejected(working_folder, deltamem, checkpoint):
    for rank, says in ((33, "hidden size, 32"), (65, "rank must be 64 or less"), (0, "rank must be 1 or more")):
        deltamem("patch", checkpoint, "--out", "adapter", "--rank", rank).assert_short_error(says, code=1)
    recipe = write_recipe(working_folder, checkpoint, memory={"rank": 33})
    before = listing(working_folder)
    deltamem("train", recipe).assert_short_error("rank 33", "hidden size, 32", "smaller rank", code=1)
    assert listing(working_folder) == before


def test_options_that_do_not_fit_are_rejected(working_folder, deltamem, checkpoint):
    for options, says in (
        (("--layers", "0,9"), "no attention in layers [9]"),
        (("--branches", "q,x"), "'x'"),
        (("--layers", "first"), "'first'"),
        (("--update-rule", "other"), "standard"),
        (("--rank", "four"), "four"),
    ):
        result = deltamem("patch", checkpoint, "--out", "adapter", *options)
        assert result.code in (1, 2) and says in result.err and "Traceback" not in result.err
    for arguments in (("patch", checkpoint), ("patch",), ("no-such",), ("eval", "x", "--limit", "a"), ("--no-such",)):
        result = deltamem(*arguments)
        assert result.code == 2 and "Usage" in result.err and "Traceback" not in result.err
    assert listing(working_folder) == {}


def test_existing_files_are_not_overwritten(working_folder, deltamem, checkpoint):
    (working_folder / "adapter").mkdir()
    (working_folder / "adapter" / "notes.txt").write_text("mine")
    before = listing(working_folder)
    deltamem("patch", checkpoint, "--out", "adapter").assert_short_error("already exists", "--overwrite", code=1)
    recipe = write_recipe(working_folder, checkpoint)
    deltamem("train", recipe).assert_short_error("already exists", "--overwrite", code=1)
    recipe.unlink()
    assert listing(working_folder) == before


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_an_output_that_cannot_be_written_is_rejected(working_folder, deltamem, checkpoint, options):
    (working_folder / "file").write_text("mine")
    before = listing(working_folder)
    for out, says in ((".", "folder you are in"), ("file/adapter", "is not a folder")):
        result = deltamem("patch", "/no/base/is/looked/for", "--out", out, *options)
        result.assert_short_error(says, "Choose", code=1)
    assert listing(working_folder) == before


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "/there"),
        NotADirectoryError(20, "Not a directory", "/there"),
        IsADirectoryError(21, "Is a directory", "/there"),
        FileExistsError(17, "File exists", "/there"),
        OSError(30, "Read-only file system", "/there"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_system_errors_are_reported_in_plain_words(working_folder, deltamem, checkpoint, monkeypatch, error):
    def refused(*_):
        raise error

    monkeypatch.setattr(save_module, "save", refused)
    result = deltamem("patch", checkpoint, "--out", "adapter")
    result.assert_short_error("/there cannot be read or written", error.strerror, "permissions", code=1)
    assert listing(working_folder) == {}


def test_an_invalid_memory_path_is_rejected(working_folder, deltamem):
    (working_folder / "folder").mkdir()
    (working_folder / "file").write_text("mine")
    for option in ("--memory", "--save-memory"):
        result = deltamem("run", "nowhere", "--prompt", "Hi", option, "folder")
        assert result.code == 2 and "'folder' is a directory" in result.err and "Traceback" not in result.err
    result = deltamem("run", "nowhere", "--prompt", "Hi", "--save-memory", "file/memory")
    result.assert_short_error("is not a folder", "Choose another place", code=1)  # before the model is searched for


def test_a_missing_device_is_rejected(working_folder, deltamem):
    for device in ("nonsense", "cuda:99"):
        result = deltamem("eval", "adapter", "--device", device)
        assert result.code == 2 and device in result.err and "Traceback" not in result.err


# Data and recipes


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json}", ["chats.jsonl:2", "is not JSON"]),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}',
            ["chats.jsonl:2", "message 2", "no role"],
        ),
        ('{"messages": [{"role": "user"}]}', ["chats.jsonl:2", "no text"]),
        ("[]", ["chats.jsonl:2", "messages"]),
    ],
)
def test_a_bad_line_of_data_is_named(working_folder, deltamem, checkpoint, line, says):
    chats = write_jsonl(working_folder / "chats.jsonl", [TALK])
    chats.write_text(chats.read_text() + line + "\n")
    recipe = write_recipe(working_folder, checkpoint, data={"path": str(chats)})
    before = listing(working_folder)
    deltamem("train", recipe).assert_short_error(*says, code=1)
    assert listing(working_folder) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("training.stesp=3", ["training.stesp", "training.steps?"]),
        ("memory.rnk=3", ["memory.rnk", "memory.rank?"]),
        ("trainin.steps=3", ["trainin", "training?"]),
        ("training.steps=many", ["training.steps must be a whole number"]),
        ("data.path=nowhere.jsonl", ["no data file nowhere.jsonl"]),
        ("base=./nowhere", ["./nowhere"]),
        ("nothing", ["key=value"]),
    ],
)
def test_an_invalid_recipe_is_rejected(working_folder, deltamem, checkpoint, change, says):
    recipe = write_recipe(working_folder, checkpoint)
    before = listing(working_folder)
    deltamem("train", recipe, "--set", change).assert_short_error(*says, code=1)
    assert listing(working_folder) == before


def test_files_that_are_not_recipes_are_rejected(working_folder, deltamem):
    deltamem("train", "nowhere.yaml").assert_short_error("no recipe nowhere.yaml", "recipes/", code=1)
    (working_folder / "recipe.yaml").write_text("base: [\n")
    deltamem("train", "recipe.yaml").assert_short_error("not YAML", code=1)
    (working_folder / "recipe.yaml").write_text("base: x\nbatch_size: 3\nout: y\ntraining: {steps: 1}\n")
    deltamem("train", "recipe.yaml").assert_short_error("line 2", "batch_size", "training.batch_size?", code=1)


def test_resuming_without_a_run_is_rejected(working_folder, deltamem, checkpoint):
    recipe = write_recipe(working_folder, checkpoint)
    before = listing(working_folder)
    deltamem("train", recipe, "--resume").assert_short_error("nothing to resume", "without --resume", code=1)
    assert listing(working_folder) == before


def test_a_base_without_a_tokenizer_is_rejected(working_folder, deltamem):
    base = save_checkpoint(working_folder / "base")
    assert deltamem("patch", base, "--out", "adapter").code == 0
    recipe = write_recipe(working_folder, base, out=str(working_folder / "other"))
    before = listing(working_folder)
    deltamem("train", recipe).assert_short_error("tokenizer", code=1)
    result = deltamem("eval", "adapter", "--set", "facts=[1]", "--set", "episodes=2")
    assert result.code == 1 and "tokenizer" in result.err and "Traceback" not in result.err
    assert listing(working_folder) == before


def test_a_damaged_memory_file_is_rejected(working_folder, deltamem):
    (working_folder / "memory").write_bytes(b"\0" * 40)
    deltamem("inspect", "memory").assert_short_error("is not a memory file", code=1)
    assert listing(working_folder) == {"memory": 40}


# A full disk


def test_a_full_disk_leaves_no_partial_adapter(working_folder, deltamem, checkpoint):
    (working_folder / "adapter").mkdir()
    before = listing(working_folder)
    with small_files(2000):
        result = deltamem("patch", checkpoint, "--out", "adapter")
    result.assert_short_error("disk is full", "half-written", "Free some space", code=1)
    assert listing(working_folder) == before


@pytest.mark.parametrize("limit", [10_000, 24_000], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_no_partial_checkpoint(working_folder, deltamem, checkpoint, limit):
    recipe = write_recipe(working_folder, checkpoint, training={"steps": 4, "batch_size": 2, "save_every": 2})
    before = listing(working_folder)
    with small_files(limit):
        result = deltamem("train", recipe)
    done_lines = [line for line in result.err.splitlines() if line.strip()]
    assert result.code == 1 and "Traceback" not in result.err and "disk is full" in result.err, result.err
    assert len(done_lines) <= 5, result.err  # the last state of the progress bar stays above the error
    assert listing(working_folder) == before


@pytest.mark.parametrize("number", [28, 122, 27], ids=["ENOSPC", "EDQUOT", "EFBIG"])
def test_a_full_disk_is_reported_as_such(working_folder, deltamem, checkpoint, monkeypatch, number):
    def full(*_):
        raise OSError(number, "no room")

    monkeypatch.setattr(save_module, "save", full)
    deltamem("patch", checkpoint, "--out", "adapter").assert_short_error("disk is full", "no room", code=1)
    assert listing(working_folder) == {}
    monkeypatch.setattr(save_module, "save", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["deltamem", "patch", str(checkpoint), "--out", "adapter"])
    with pytest.raises(ZeroDivisionError):  # an unexpected error keeps its traceback
        cli.main()
    assert listing(working_folder) == {}


# Ctrl-C


STEPS = 50  # enough of them for a Ctrl-C to come in time


@pytest.mark.slow
def test_ctrl_c_in_training_keeps_the_adapter_and_says_how_to_resume(working_folder, deltamem, checkpoint):
    """The adapter so far is kept, and the command in the message resumes the run."""
    facts = [dialogues.Fact("dog", "Rex"), dialogues.Fact("house", "Oslo")]
    conversations = [[user(fact.answer), assistant("Okay."), user("And?"), assistant(fact.answer)] for fact in facts]
    chats = write_jsonl(working_folder / "chats.jsonl", conversations)
    training = {"steps": STEPS, "batch_size": 2, "save_every": 5}
    recipe = write_recipe(working_folder, checkpoint, training=training, data={"path": str(chats)})
    process = subprocess.Popen(
        [*START, "train", str(recipe)], cwd=working_folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (working_folder / "adapter.run" / "checkpoint-5" / "trainer_state.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1 and out == "" and "Traceback" not in err, err
    assert "Interrupted after step" in err and f"of {STEPS}" in err and "--resume" in err
    assert f"{working_folder}/adapter" in err.replace("\n", "")
    before = {path.name for path in working_folder.iterdir()}
    assert before == {"chats.jsonl", "recipe.yaml", "adapter", "adapter.run"}
    files = {"deltamem_config.json", "deltamem.safetensors", "training.json", "training.png"}
    assert {path.name for path in (working_folder / "adapter").iterdir()} == files
    assert load(working_folder / "adapter") is not None
    result = deltamem("train", recipe, "--resume", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["steps"] == STEPS
    assert {path.name for path in working_folder.iterdir()} == {"chats.jsonl", "recipe.yaml", "adapter"}
