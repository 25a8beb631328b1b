"""What a memory costs in eager PyTorch: prefill and decode with it and without it, as ratios.

Command: python benchmarks/overhead.py [--layers 4 --prefill 4096 --past 256 --repeats 7 --threads 2] [--profile]

The shape is Qwen3-0.6B's with few layers, random weights and a small vocabulary, so that the output head does not hide
anything. Both sides are one model: the memory is put on and taken off between runs, which alternate. `--profile` shows
where the time of the patched model goes (torch.profiler).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from scan import cpu_name
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, Qwen3Config

from deltamem_tool import DeltaMemConfig, MemoryCache, attach, detach
from deltamem_tool.adapter_module import DeltaMemAdapter
from deltamem_tool.config import PRESETS
from deltamem_tool.surgery import adapter_of, hook

DECODED = 64  # tokens of one timed decode


def make_model(layers: int) -> PreTrainedModel:
    """Qwen3-0.6B's layer: width 1,024, 16 query and 8 key heads of 128, 3,072 in the MLP."""
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def cache_of(model: PreTrainedModel, patched: bool) -> DynamicCache:
    return MemoryCache(model) if patched else DynamicCache(config=model.config)


def prefill(model: PreTrainedModel, ids: torch.Tensor, patched: bool) -> float:
    """Seconds of one call over `ids`."""
    marks = torch.full(ids.shape, 1, dtype=torch.int8)
    marks[:, 31::32] = 2  # where the memory writes by messages: of 32 tokens
    cache = cache_of(model, patched)
    if patched and adapter_of(model).config.granularity != "token":
        cache.segments = marks
    start = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - start


def decode(model: PreTrainedModel, ids: torch.Tensor, patched: bool) -> float:
    """Seconds of one token after `ids`, mean over a few."""
    cache = cache_of(model, patched)
    model(ids, past_key_values=cache, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(DECODED):
        model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
    return (time.perf_counter() - start) / DECODED


def compare(
    run: Callable[..., float], model: PreTrainedModel, adapter: DeltaMemAdapter, ids: torch.Tensor, repeats: int
) -> tuple[float, float, list[float]]:
    """Median seconds with a memory and without, and the ratio of each pair of runs."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(repeats + 1):
        for patched in (False, True):
            if patched:
                hook(model, adapter)
            seconds = run(model, ids, patched)
            if patched:
                detach(model)
            if repeat:  # the first round warms up
                times[patched].append(seconds)
    ratios = [with_memory / without for with_memory, without in zip(times[True], times[False], strict=True)]
    return statistics.median(times[True]), statistics.median(times[False]), ratios


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"layers": 4, "prefill": 4096, "past": 256, "repeats": 7, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = make_model(args.layers)
    print(f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}, {args.layers} layers")
    print("| preset | run | with | without | ratio, median (range) |\n|---|---|---|---|---|")
    for preset in args.presets.split(","):
        adapter = attach(model, DeltaMemConfig.preset(preset))
        if args.profile:
            show_profile(model, args)
        detach(model)
        for name, run, length in (("prefill", prefill, args.prefill), ("decode", decode, args.past)):
            ids = torch.randint(1024, (1, length))
            with_memory, without, ratios = compare(run, model, adapter, ids, args.repeats)
            print(
                f"| {preset} | {name}, {length} tokens | {1e3 * with_memory:.1f} ms | {1e3 * without:.1f} ms "
                f"| **{statistics.median(ratios):.3f}** ({min(ratios):.3f}–{max(ratios):.3f}) |",
                flush=True,
            )


def show_profile(model: PreTrainedModel, args: argparse.Namespace) -> None:
    for run, length in ((prefill, args.prefill), (decode, args.past)):
        ids = torch.randint(1024, (1, length))
        run(model, ids, True)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            run(model, ids, True)
        print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    main()
