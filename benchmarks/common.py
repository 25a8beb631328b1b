"""Shared code of the benchmarks: random models of Qwen3's shape, paired measurements, commands, spreads, versions."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from deltamem_tool.bench.result import quartiles
from deltamem_tool.bench.timing import interleave

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnx", "onnxscript", "onnx-ir", "transformers", "torch")
Seconds = tuple[float, float]  # wall-clock time and CPU time; other work on the machine hardly affects the latter

WATCH_SECONDS = 0.05  # interval at which a process is polled


def qwen3(
    layers: int,
    vocabulary: int,
    width: int = 1024,
    mlp: int = 3072,
    heads: int = 16,
    tied: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
) -> PreTrainedModel:
    """Return a random model of Qwen3's architecture, by default with Qwen3-0.6B's layer shape."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def few_words() -> PreTrainedTokenizerFast:
    """Return a tokenizer with three words, for exports that are only measured."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="c")


@torch.no_grad()
def randomize(adapter: torch.nn.Module, *names: str) -> None:
    """Randomise the adapter's parameters, or those with one of `names` in their name. Fresh ones are mostly zeros."""
    for name, parameter in adapter.named_parameters():
        if not names or any(part in name for part in names):
            parameter.normal_(std=0.02)


def timed(call: Callable[[], object], calls: int = 1, wait: Callable[[], None] = lambda: None) -> Seconds:
    """Return the seconds of one call, the mean over `calls`. `wait` returns when the device has finished."""
    wait()
    start, of_processor = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - start) / calls, (time.process_time() - of_processor) / calls


def compare(
    one: Callable[[], Seconds], other: Callable[[], Seconds], repeats: int
) -> tuple[list[float], list[list[float]]]:
    """Return the median seconds of both, and the ratios of wall-clock and of CPU time for every pair of runs."""
    pairs = interleave({"one": one, "other": other}, repeats).values.values()
    medians = [statistics.median(clock for clock, _ in taken) for taken in pairs]
    ratios = [[a / b for a, b in zip(mine, others, strict=True)] for mine, others in zip(*pairs, strict=True)]
    return medians, [list(kind) for kind in zip(*ratios, strict=True)]


def spread(ratios: Sequence[float]) -> str:
    """Format the median, the quartiles and the range."""
    quarters = quartiles(ratios)
    return f"**{quarters.median:.3f}** ({quarters.low:.3f}–{quarters.high:.3f}; {min(ratios):.3f}–{max(ratios):.3f})"


def versions(*packages: str) -> str:
    """Return the names and versions of the installed ones among `packages`."""
    texts = []
    for package in packages:
        try:
            texts.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # only one of ONNX Runtime's distributions is installed
            continue
    return ", ".join(texts)


@dataclass(frozen=True)
class Command:
    """Output and cost of a command.

    Args:
        output: its output.
        seconds: wall-clock time.
        of_processor: CPU time in seconds, including its children.
        resident: peak resident memory in bytes. `own` is memory of the process alone, `mapped` are pages of files,
            which the system can reclaim.
    """

    output: str
    seconds: float
    of_processor: float
    resident: int
    own: int
    mapped: int


def watched(*arguments: object) -> Command:
    """Run Python with these arguments while polling its memory (on Linux). Exit this process if it fails."""
    command = [sys.executable, *map(str, arguments)]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        peak = {"resident": 0, "own": 0, "mapped": 0}
        ended = 0
        while not ended:
            now = _resident(process.pid)
            peak = {name: max(peak[name], now[name]) for name in peak}
            time.sleep(WATCH_SECONDS)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (output, errors):
            file.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
        return Command(output.read(), seconds, usage.ru_utime + usage.ru_stime, **peak)


def _resident(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # the process has just ended
        lines = []
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    own, mapped = (int(kilobytes.get(name, 0)) * 1024 for name in ("RssAnon", "RssFile"))
    return {"resident": own + mapped, "own": own, "mapped": mapped}
