"""Compare the implementations of the scan, forward and backward, on the CPU and on the GPU if there is one.

Command: python benchmarks/scan.py [--tokens 8192 --batch 1 --heads 1 --rank 8 --repeats 5 --threads 2]
"""

import argparse
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_tool.bench.timing import cpu_name, interleave
from deltamem_tool.ops.scan import Implementation, delta_scan

ON_CPU: tuple[Implementation, ...] = ("naive", "recurrent", "chunked")
ON_GPU: tuple[Implementation, ...] = ("chunked", "triton")


def make_inputs(batch: int, tokens: int, heads: int, rank: int) -> list[Tensor]:
    """Return inputs for the standard rule, with the mechanism's initial gate bias of -1.5."""
    shape = (batch, tokens, heads, rank)
    q, k = F.normalize(torch.randn(shape), dim=-1), F.normalize(torch.randn(shape), dim=-1)
    z = torch.randn(shape) - 1.5
    beta = torch.sigmoid(z)
    inputs = [q, k, torch.randn(shape), F.logsigmoid(-z), beta, beta.clone(), torch.randn(batch, heads, rank, rank)]
    return [x.requires_grad_() for x in inputs]


def measure(inputs: list[Tensor], implementation: Implementation) -> tuple[float, float]:
    """Return the seconds of one forward and one backward pass."""
    wait = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    reads, state = delta_scan(*inputs, implementation=implementation)
    wait()
    middle = time.perf_counter()
    torch.autograd.grad(reads.sum() + state.sum(), inputs)
    wait()
    return middle - start, time.perf_counter() - middle


def compare(inputs: list[Tensor], implementations: tuple[Implementation, ...], repeats: int) -> None:
    """Print a table of medians, with the speedup of each implementation over the first."""
    times = interleave({name: partial(measure, inputs, name) for name in implementations}, repeats).values

    print("| implementation | forward ms | backward ms | both ms | ratio |")
    print("|---|---:|---:|---:|---:|")
    both = {name: statistics.median(f + b for f, b in pairs) for name, pairs in times.items()}
    for name, pairs in times.items():
        forward, backward = (statistics.median(part) for part in zip(*pairs, strict=True))
        ratio = both[implementations[0]] / both[name]
        print(f"| {name} | {forward * 1e3:.2f} | {backward * 1e3:.2f} | {both[name] * 1e3:.2f} | {ratio:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"tokens": 8192, "batch": 1, "heads": 1, "rank": 8, "repeats": 5, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    inputs = make_inputs(args.batch, args.tokens, args.heads, args.rank)
    print(f"B = {args.batch}, T = {args.tokens}, H = {args.heads}, R = {args.rank}, float32; medians of {args.repeats}")
    print(f"torch {torch.__version__}, {cpu_name()}, threads: {torch.get_num_threads()}\n")
    compare(inputs, ON_CPU, args.repeats)
    if torch.cuda.is_available():
        print(f"\n{torch.cuda.get_device_name()}\n")
        compare([x.detach().cuda().requires_grad_() for x in inputs], ON_GPU, args.repeats)


if __name__ == "__main__":
    main()
