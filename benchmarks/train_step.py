"""Compare a training step with a memory with that of a LoRA on the same tokens, in time and peak memory.

Command: python benchmarks/train_step.py [--shape small|0.6b|4b] [--layers 4] [--write-tokens 2048 --read-tokens 64]
    [--presets tsw,ssw,msw] [--repeats 7] [--threads 2] [--device cuda --dtype bfloat16] [--gradient-checkpointing]
    [--profile] [--out FILE.md]

A step is forward, backward and AdamW. With a memory, it is the step of `deltamem train`: it writes a history and
answers from the state. With a LoRA (PEFT, rank 8 on q and o), history and exchange are one sequence. Both score the
second half of the exchange, and compute no other logits. The sides share random weights and run in turn.

Peak memory is what a step needs beyond the models, including the states of the optimizer. On a GPU it comes from the
allocator, on a CPU from the profiler's record of every allocation. As an independent check, it is also the growth of
the resident set of a process that only runs the steps of one side (Linux).
"""

import argparse
import copy
import gc
import multiprocessing
import os
import platform
import re
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from common import Seconds, compare, qwen3, timed
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool.baselines.lora import new_lora
from deltamem_tool.bench.timing import cpu_name
from deltamem_tool.config import PRESETS
from deltamem_tool.recipe.load import LoraOptions
from deltamem_tool.segments.tags import SegmentTag
from deltamem_tool.training.baseline_steps import LoraStepModel
from deltamem_tool.training.loss import EpisodeModel

SEGMENT = 32  # tokens per message, if the memory writes by messages
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LORA = "LoRA"

# Qwen3's hidden size and MLP size, query heads, layers and vocabulary. "small" has four of 0.6B's layers, with so few
# words that embedding and head do not dominate.
SHAPES = {
    "small": (1024, 3072, 16, 4, 1024),
    "0.6b": (1024, 3072, 16, 28, 151936),
    "4b": (2560, 9728, 32, 36, 151936),
}


class Side:
    """One way to train: a step and its optimizer."""

    def __init__(self, name: str, args: argparse.Namespace, base: PreTrainedModel, batch: dict[str, Tensor]) -> None:
        twin = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})  # the weights are shared
        self.batch = batch
        if name == LORA:
            lora = new_lora(twin, LoraOptions(rank=8, targets=("q_proj", "o_proj"), dropout=0.0))
            self.model: nn.Module = LoraStepModel(lora, recompute=args.gradient_checkpointing)
        else:
            attach(twin, DeltaMemConfig.preset(name)).to(base.device)
            self.model = EpisodeModel(twin, recompute=args.gradient_checkpointing)
            if PRESETS[name]["granularity"] != "token":
                tags = torch.full(batch["write_ids"].shape, SegmentTag.INSIDE, dtype=torch.int8, device=base.device)
                tags[:, SEGMENT - 1 :: SEGMENT] = SegmentTag.LAST
                self.batch = batch | {"write_segment_tags": tags}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self) -> None:
        self.model(**self.batch)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    width, mlp, heads, layers, vocabulary = SHAPES[args.shape]
    if args.width:
        width, mlp, heads = args.width, 3 * args.width, args.width // 64
    return qwen3(args.layers or layers, vocabulary, width, mlp, heads, dtype=args.dtype, device=args.device)


def make_batch(args: argparse.Namespace, vocabulary: int) -> dict[str, Tensor]:
    """Return one conversation, as `data.collate` does, with its full view."""
    write, read = torch.randint(vocabulary, (1, args.write_tokens)), torch.randint(vocabulary, (1, args.read_tokens))
    full = torch.cat([write, read], dim=1)
    scored = torch.arange(args.read_tokens // 2 - 1, args.read_tokens - 1)
    batch = {"write_ids": write, "read_ids": read, "full_ids": full}
    batch |= {name.replace("ids", "mask"): torch.ones_like(ids) for name, ids in batch.items()}
    batch |= {"labels": read, "rows": torch.tensor([0]), "targets": read[0, scored + 1]}
    batch |= {"scored": scored, "full_scored": scored + args.write_tokens}
    return {name: tensor.to(args.device) for name, tensor in batch.items()}


def make_sides(names: list[str], args: argparse.Namespace) -> dict[str, Side]:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = make_model(args)
    batch = make_batch(args, base.config.vocab_size)
    return {name: Side(name, args, base, batch) for name in names}


def seconds(side: Side) -> Seconds:
    """Return the seconds of one step."""
    return timed(side.step, wait=torch.cuda.synchronize if side.batch["rows"].is_cuda else lambda: None)


def peak_bytes(side: Side) -> int:
    """Return the peak memory of tensors in a step, beyond the memory before it."""
    gc.collect()
    if side.batch["rows"].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        side.step()
    events: Any = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    taken = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        taken += event.nbytes()  # negative if memory is freed
        peak = max(peak, taken)
    return peak


def resident(field: str) -> int:
    """Return the resident memory of this process in bytes, now (VmRSS) or at its peak (VmHWM)."""
    match = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert match is not None
    return 1024 * int(match[1])


def peak_resident(name: str, args: argparse.Namespace) -> int:
    """Return the same as `peak_bytes` for the whole process, which must do nothing else."""
    side = make_sides([name], args)[name]
    side.step()  # libraries take what they will keep
    gc.collect()
    CLEAR_REFS.write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    side.step()
    return resident("VmHWM") - before


def spread(ratios: list[float]) -> str:
    return f"**{statistics.median(ratios):.3f}** ({min(ratios):.3f}–{max(ratios):.3f})"


def in_child(name: str, args: argparse.Namespace) -> int:
    """Run `peak_resident` in a separate process, in which glibc frees the memory of each tensor immediately."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_resident, name, args).result()


def rows(args: argparse.Namespace) -> Iterator[str]:
    """Yield the rows of the table."""
    names = args.presets.split(",")
    check = args.device == "cpu" and CLEAR_REFS.exists()
    resident_of = {name: in_child(name, args) for name in (LORA, *names)} if check else {}
    sides = make_sides([LORA, *names], args)
    yield "| preset | step | LoRA | time ratio (range) | CPU time ratio | peak | LoRA | ratio | resident ratio |"
    yield "|---|---|---|---|---|---|---|---|---|"
    lora = sides[LORA]
    for name in names:
        (memory, of_lora), (ratios, of_processor) = compare(
            *(partial(seconds, each) for each in (sides[name], lora)), args.repeats
        )
        peak, peak_lora = peak_bytes(sides[name]), peak_bytes(lora)
        of_resident = f"{resident_of[name] / resident_of[LORA]:.3f}" if check else "–"
        yield (
            f"| {name} | {memory:.3f} s | {of_lora:.3f} s "
            f"| {spread(ratios)} | {spread(of_processor) if args.device == 'cpu' else '–'} "
            f"| {peak / 2**20:.0f} MiB | {peak_lora / 2**20:.0f} MiB | **{peak / peak_lora:.3f}** | {of_resident} |"
        )
        if args.profile:
            show_profile(sides[name], args)
    if args.profile:
        show_profile(lora, args)


def show_profile(side: Side, args: argparse.Namespace) -> None:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device == "cuda")
    with profile(activities=activities) as trace:
        side.step()
    print(trace.key_averages().table(sort_by=f"self_{args.device}_time_total", row_limit=30))


def heading(args: argparse.Namespace) -> Iterator[str]:
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{cpu_name()}, {args.threads} thread(s)"
    cores = f" on {len(os.sched_getaffinity(0))} core(s)" if hasattr(os, "sched_getaffinity") else ""
    layers = args.layers or SHAPES[args.shape][3]
    yield f"{date.today()}, {device}{cores}, Python {platform.python_version()}, torch {torch.__version__}, "
    yield f"transformers {transformers.__version__}, peft {peft.__version__}; shape {args.shape}"
    yield f"{f', width {args.width}' if args.width else ''}, {layers} layers, {args.dtype}, {args.write_tokens} tokens "
    yield f"written and {args.read_tokens} read{', layers recomputed' if args.gradient_checkpointing else ''}; "
    yield f"{args.repeats} pairs of steps.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {"write-tokens": 2048, "read-tokens": 64, "repeats": 7, "threads": 2}
    for name, default in {"layers": None, "width": None, **numbers}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true", help="show where the time of each step goes")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()

    lines = ["".join(heading(args))]
    print(lines[0])
    for row in rows(args):
        print(row, flush=True)
        lines.append(row)
    if args.out:
        with args.out.open("a") as file:
            file.write("\n".join(lines) + "\n\n")


if __name__ == "__main__":
    main()
