"""Material for the fuzz tests: valid files, invalid files of every kind, and valid command lines."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
from pathlib import Path

import yaml
from baselines.loras import make_lora
from evaluation.published import QUESTION, TALK
from helpers.parity_cases import FOLDER
from helpers.tiny import save_checkpoint, tiny_tokenizer, write_jsonl

from deltamem_tool import cli

# Each starts its work, on the files of `right_files`.
SOUND = """
architectures qwen --json
architectures
patch base --out new --rank 2 --state-heads 2
patch base --out new --granularity sentence --delta-init base_slice --branches q,k,v,o --layers front:1 --json
patch someone/base --out new/x --preset ssw --rank 2
convert reference --base reference-base --out new
convert adapter --to reference --out new --json
inspect adapter
inspect adapter --json
inspect onnx
inspect onnx --json
inspect me.safetensors --row 0 --plot new.png
inspect me.safetensors other.safetensors --json
train train.yaml
train train.yaml --set data.path=talks.jsonl --set training.steps=2 --set training.write_chunk=8 --bptt 1 --json
train train.yaml --dry-run --json
train train.yaml --out adapter --overwrite --skip-bad-rows
train lora.yaml --json
eval adapter --set facts=[1] --set episodes=2 --conditions zero_state --plot new.png --out new.json
eval adapter --set facts=[1] --set episodes=2 --bm25 --truncate 20 --protocol window:30 --json
eval adapter --task perplexity --data talks.jsonl --limit 2 --report new --lora lora
eval adapter --task locomo --data locomo.json --limit 2 --records new --batch-size 1
eval adapter --task hotpotqa --data hotpotqa.json --limit 2 --base base --json
eval onnx --set facts=[1] --set episodes=2 --conditions zero_state --provider cpu --json
compare evaluated-a evaluated-b --out new.json
compare evaluated-a evaluated-a/evaluation.json --json
bench adapter --prompt 4 --decode 1 --repeats 1 --no-peak --models base,memory --out new.json
bench adapter --prompt 4,2 --decode 1 --repeats 1 --no-peak --lora lora --dtype bfloat16 --json
export adapter --out new --json
export adapter --out new/x --target portable --logits all
export adapter --out new --max-length 64 --base base
run onnx --prompt Hello. --max-new-tokens 2 --save-memory new.safetensors
run onnx --prompt Hello. --prompt Who? --memory me.safetensors --temperature 0.7 --seed 1 --max-new-tokens 2 --json
chat adapter --memory me.safetensors --max-new-tokens 2
chat adapter --memory new.safetensors --system Be_brief. --window 60 --max-new-tokens 2 --top-k 3 --temperature 1
chat onnx --memory new/x.safetensors --max-new-tokens 2 --stop e
serve onnx --port 0 --store sqlite:///new.sqlite --max-batch 2 --keep-versions 3
serve --new-key acme --api-keys new
push adapter someone/new --base-model someone/base --dry-run
push adapter someone/new --base-model someone/base --license mit --message m --json
push onnx someone/new --base-model someone/base
pull someone/adapter --out new
pull someone/adapter --json
quickstart --fast --out new
quickstart --fast --out [b]new[/b] --json
"""
STDINS = [
    b"Hello.\n/help\n/undo\n/save x\n",
    b"",
    b"My dog is Rex.\n/memory\n/context\n/memory 1\n/load other.safetensors\n/undo\n/forget\nWho?\n/quit\nmore\n",
    b"\xef\xbb\xbf/help\n//help\n/save me.safetensors\n/load adapter\n/memory x\n/nothing\n",
    b"\xff\xfe broken\n",
    b"a\0b\r\n\x1b[2J\n/load \0\n/save new/\xc3\xa9\n/load ~nobody/x\n\xed\xa0\x80\n",
    "🦜 ".encode() * 300,
]
# Paths to write to, or that do not exist.
PLACES = ["new", "new.json", "new.png", "new.pdf", "new.xyz", "new.safetensors", "new/x", "text.txt/x", "folder-empty/"]
PLACES += ["", ".", "..", "~", "~/x", "~nobody/x", "n\new", "ü" * 300, "-x", "[b]x[/b]", "[/x]", "$x$", "\udcff.json"]
PLACES += ["a" * 5000, "onnx/model.onnx", "evaluated-a/records.jsonl", "builtin:adapter", "builtin:nothing", "a/b/c"]
PLACES += ["nobody/nothing", "someone/adapter", "someone/base", "someone/adapter@main", "someone/base@nowhere"]
PLACES += ["https://x.invalid/y", "hf://someone/adapter"]


def wrong_files(folder: Path) -> None:
    """Files and folders that are not what a command expects."""
    randomness = random.Random(0)
    contents = {
        "empty": b"",
        "random.bin": randomness.randbytes(3000),
        "text.txt": b"My dog is called Rex.\n",
        "latin1.yaml": "base: caf\xe9\n".encode("latin-1"),
        "bom.json": b"\xef\xbb\xbf{}",
        "bom.yaml": b"\xef\xbb\xbfbase: base\nout: new\ntraining: {steps: 1}\n",
        "utf16.yaml": "base: base\nout: new\n".encode("utf-16"),
        "list.json": b"[1, 2]",
        "deep.json": b"[" * 20000,
        "nan.json": b'{"a": NaN}',
        "huge.json": b'{"format": ' + b"9" * 5000 + b"}",
        "surrogate.jsonl": b'{"messages": [{"role": "user", "content": "\\ud800"}]}\n',
        "roles.jsonl": b'{"messages": [{"role": "nobody", "content": 3}]}\n{"messages": {}}\n',
        "numbers.jsonl": b'{"messages": [{"role": "user", "content": 1e999}, {"role": "tool", "content": null}]}\n3\n',
        "nul.jsonl": b'{"messages": [{"role": "user", "content": "a\\u0000b"}]}\n\0\0\n',
        "alias.yaml": b"a: &a [x, x]\nb: &b [*a, *a]\nbase: *b\n",
        "recipe.yaml": b"base: missing\nout: adapter-out\n",
        "keys.yaml": b"base: base\nout: adapter-out\nmemory: {rank: -1, colour: red}\n",
        "null.yaml": b"base:\nout:\n",
        "huge.yaml": b"base: base\nout: new\ntraining: {steps: 9999999999999999999, warmup: .inf, seed: .nan}\n",
        "tabs.yaml": b"base:\tbase\n\tout: new\n",
        "python.yaml": b"!!python/object/apply:os.system ['true']\n",
        "short.safetensors": b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
        "header.safetensors": b"\x02\0\0\0\0\0\0\0{}",
        "[b]name[/b].safetensors": b"\x02\0\0\0\0\0\0\0{}",
        "folder-config/adapter_config.json": b"{}",
        "folder-config/deltamem_config.json": b'{"format": 99}',
        "folder-onnx/model.onnx": b"\x08\x07garbage",
        "folder-onnx/deltamem.json": b'{"format": 1}',
        "folder-eval/evaluation.json": b'{"format": 1, "rows": "many"}',
        "folder-eval/records.jsonl": b"{\n",
        "folder-base/config.json": b'{"model_type": "llama", "hidden_size": "wide"}',
        "folder-base/model.safetensors": b"\0" * 40,
        "folder-strange/config.json": b'{"model_type": "no_such_type", "architectures": ["X"]}',
        "folder-list/config.json": b"[]",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "folder-empty").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "linked.safetensors").symlink_to("me.safetensors")


def special_files(folder: Path) -> None:
    """Special files that cannot be copied."""
    os.mkfifo(folder / "fifo")
    for name in ("unreadable.json", "unreadable.safetensors"):
        (folder / name).write_bytes(b"{}")
        (folder / name).chmod(0)
    (folder / "folder-unreadable").mkdir(0)


def right_files(folder: Path) -> None:
    """A base model and everything that commands can make from it, each by its own command."""
    talk = [{"role": "user", "content": "My dog is Rex."}, {"role": "assistant", "content": "Noted."}]
    talk += [{"role": "user", "content": "Who is my dog?"}, {"role": "assistant", "content": "Rex."}]
    save_checkpoint(folder / "base", tiny_tokenizer())
    write_jsonl(folder / "talks.jsonl", [talk, talk])
    (folder / "locomo.json").write_text(json.dumps([TALK, {**TALK, "sample_id": "other"}]))
    (folder / "hotpotqa.json").write_text(json.dumps([QUESTION, {**QUESTION, "_id": "other"}]))
    recipe = {"base": "base", "out": "new", "training": {"steps": 1, "batch_size": 1}, "memory": {"rank": 2}}
    recipe["data"] = {"facts_first": 1, "facts_last": 1}
    (folder / "train.yaml").write_text(yaml.safe_dump(recipe))
    lora = {name: options for name, options in recipe.items() if name != "memory"} | {"lora": {"rank": 2}}
    (folder / "lora.yaml").write_text(yaml.safe_dump(lora))
    shutil.copytree(FOLDER / "tsw_qo_qwen3" / "adapter", folder / "reference")
    shutil.copytree(FOLDER / "tsw_qo_qwen3" / "base", folder / "reference-base")
    with contextlib.chdir(folder):
        make_lora("base", "lora")
        for command in (
            "patch base --out adapter --rank 4 --delta-init random",
            "export adapter --out onnx",
            "run onnx --prompt Hello. --max-new-tokens 1 --save-memory me.safetensors",
            "run onnx --prompt Bye. --max-new-tokens 1 --save-memory other.safetensors",
            "eval adapter --set facts=[1] --set episodes=2 --report evaluated-a",
            "eval adapter --set facts=[1] --set episodes=2 --conditions zero_state --report evaluated-b",
        ):
            with contextlib.redirect_stdout(sys.stderr):
                cli.cli.main(command.split(), standalone_mode=False)


def cut_copies(folder: Path) -> None:
    """Copies of valid folders with one file truncated or missing."""
    for whole in ("adapter", "onnx", "base", "evaluated-a"):
        for file in sorted(path for path in (folder / whole).iterdir() if path.is_file() and path.suffix != ".html"):
            for kind in ("cut", "without"):
                copy = folder / f"{whole}-{kind}-{file.name}"
                shutil.copytree(folder / whole, copy)
                if kind == "cut":
                    (copy / file.name).write_bytes(file.read_bytes()[: file.stat().st_size // 2])
                else:
                    (copy / file.name).unlink()
    for file in ("me.safetensors", "talks.jsonl", "locomo.json", "train.yaml"):
        content = (folder / file).read_bytes()
        (folder / f"cut-{file}").write_bytes(content[: len(content) // 2])
