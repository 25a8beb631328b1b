"""What the scripts share: Qwen3's shape with random weights, pairs of measurements, commands, spreads, and versions."""

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
from deltamem_tool.bench.timing import in_turn

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnx", "onnxscript", "onnx-ir", "transformers", "torch")
Seconds = tuple[float, float]  # by the clock, and of the processor: other work on the machine hardly changes the latter

WATCH_SECONDS = 0.05  # between two looks at a process


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
    """A model of Qwen3's architecture with random weights, by default of Qwen3-0.6B's layer shape."""
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
    """A tokenizer of three words, for exports that nobody talks to."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="c")


@torch.no_grad()
def randomize(adapter: torch.nn.Module, *names: str) -> None:
    """Draw the adapter's parameters, or those with one of `names` in their name: many of a fresh one are zeros."""
    for name, parameter in adapter.named_parameters():
        if not names or any(part in name for part in names):
            parameter.normal_(std=0.02)


def timed(call: Callable[[], object], calls: int = 1, wait: Callable[[], None] = lambda: None) -> Seconds:
    """Seconds of one call, the mean over `calls`; `wait` returns when the device has finished."""
    wait()
    start, of_processor = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - start) / calls, (time.process_time() - of_processor) / calls


def compare(
    one: Callable[[], Seconds], other: Callable[[], Seconds], repeats: int
) -> tuple[list[float], list[list[float]]]:
    """Median seconds of both, and for every pair of runs the ratio of their seconds, and of the processor's."""
    pairs = in_turn({"one": one, "other": other}, repeats).values.values()
    medians = [statistics.median(clock for clock, _ in taken) for taken in pairs]
    ratios = [[a / b for a, b in zip(mine, others, strict=True)] for mine, others in zip(*pairs, strict=True)]
    return medians, [list(kind) for kind in zip(*ratios, strict=True)]


def spread(ratios: Sequence[float]) -> str:
    """The median, its quartiles, and the range."""
    quarters = quartiles(ratios)
    return f"**{quarters.median:.3f}** ({quarters.low:.3f}–{quarters.high:.3f}; {min(ratios):.3f}–{max(ratios):.3f})"


def versions(*packages: str) -> str:
    """Names and versions of those `packages` that are installed."""
    texts = []
    for package in packages:
        try:
            texts.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # one of the two distributions of ONNX Runtime
            continue
    return ", ".join(texts)


@dataclass(frozen=True)
class Command:
    """What a command printed and took.

    Args:
        output: what it printed.
        seconds: by the clock.
        of_processor: seconds of the processor, its children's too.
        resident: most bytes of memory that it held at once; `own` are those that only it can hold, `mapped` are pages
            of files, which the system can take back.
    """

    output: str
    seconds: float
    of_processor: float
    resident: int
    own: int
    mapped: int


def watched(*arguments: object) -> Command:
    """Run Python with these arguments, and look at its memory meanwhile (on Linux); end this process if it fails."""
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
    except OSError:  # it has just ended
        lines = []
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    own, mapped = (int(kilobytes.get(name, 0)) * 1024 for name in ("RssAnon", "RssFile"))
    return {"resident": own + mapped, "own": own, "mapped": mapped}
