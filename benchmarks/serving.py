"""Measure the gain from batching and the overhead of the scheduler, without a server.

Command: python benchmarks/serving.py [--folder DIR] [--users 32] [--tokens 64] [--long 1500] [--repeats 7]
    [--threads N] [--out FILE.md]

The model is the shipped adapter as an ONNX graph for the CPU, or the one in `--folder`. Every user asks once, with its
own memory, and gets an answer of exactly `--tokens` tokens. The same requests are answered sequentially and all at
once, in turn in this process, and `engine.step` alone feeds the same number of rows. Ratios are computed pair by pair,
of wall-clock time and of CPU time, which other work on the machine affects less.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
from common import PACKAGES, Seconds, compare, spread, timed, versions

from deltamem_tool.bench.timing import cpu_name
from deltamem_tool.chat.engine import Past, empty_memory
from deltamem_tool.chat.generation import Token, feed
from deltamem_tool.chat.group import PaddedGroup, PastRow
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.chat.transcript import Transcript
from deltamem_tool.io.cores import default_threads
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.onnx.runtime.engine import OnnxModel
from deltamem_tool.serve.batching.job import Completion, Job
from deltamem_tool.serve.batching.scheduler import PIECE, Scheduler

BESIDE = 300  # tokens of each answer while a long prompt is read
Rows = list[tuple[str, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--long", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report = run(options, options.folder or exported(Path(temporary) / "onnx"))
    print(report)
    if options.out:
        options.out.write_text(report + "\n", encoding="utf-8")


def exported(folder: Path) -> Path:
    """Export the shipped adapter to an ONNX folder."""
    from transformers import AutoTokenizer

    import deltamem_tool

    model = deltamem_tool.load("builtin:adapter")
    deltamem_tool.export_onnx(model, AutoTokenizer.from_pretrained(model.name_or_path), folder)
    return folder


def run(options: argparse.Namespace, folder: Path) -> str:
    """Return the tables, in Markdown."""
    engine = OnnxModel(folder, threads=options.threads)
    engine.stop_tokens = frozenset()  # so that all answers have the same length
    jobs = [request(engine, user, options.tokens) for user in range(options.users)]
    loads = os.getloadavg()[0]
    with Scheduler(engine, max_batch=options.users, cache_bytes=0) as scheduler:
        together, ratios = faster_together(scheduler, jobs, options.repeats)
        beside, overhead = beside_the_model(scheduler, jobs, options.repeats)
    ceiling = model_alone(engine, jobs, options.repeats)
    moves = joining(engine, jobs, options.repeats)
    stalls = longest_gaps(engine, jobs, options.long)
    prompt = statistics.mean(len(job.tokens) for job in jobs)
    name = "The shipped adapter" if options.folder is None else options.folder.name
    return "\n".join(
        [
            f"# {options.users} users of one model, {date.today()}",
            "",
            f"{name}: prompts of {prompt:.0f} tokens, answers of {options.tokens}; {options.repeats} repeats in turn;"
            f" medians. {cpu_name()}, {options.threads} thread(s), {os.cpu_count()} cores with a load of"
            f" {loads:.1f} to {os.getloadavg()[0]:.1f}; {versions(*PACKAGES)}.",
            "",
            *table(("requests", "tokens per second", "first token, median", "first token, p95"), together),
            "",
            f"One at a time against all at once: {spread(ratios[0])} in wall-clock time, {spread(ratios[1])} in CPU"
            " time (median, quartiles, range).",
            "",
            f"The model's own steps, {options.users} with one row against one with all: {spread(ceiling[0])} in"
            f" wall-clock time, {spread(ceiling[1])} in CPU time. Batching can only gain more outside of the model.",
            "",
            *table(("decode step", "wall-clock time"), beside),
            "",
            f"The scheduler's step against `engine.step`: {spread(overhead[0])} in wall-clock time,"
            f" {spread(overhead[1])} in CPU time, including the readers of the answers.",
            "",
            *table(("rows in", "one leaves and one joins", "decode step"), moves),
            "",
            "These are CPU times.",
            "",
            f"While a prompt of {options.long} tokens is read during {options.users - 1} answers:",
            "",
            *table(("pieces", "between two texts of another answer, median", "maximum"), stalls),
            "",
            "These too.",
        ]
    )


def table(head: Sequence[str], rows: Rows) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def request(engine: OnnxModel, user: int, tokens: int) -> Job:
    """Return a question with its own memory."""
    _, ids = Transcript().begin(engine.text, f"My dog is called Rex and I am user {user}. What is my dog's name?")
    numbers, empty = np.random.default_rng(user), empty_memory(engine)
    states = {i: numbers.normal(0, 0.1, state.shape).astype(np.float32) for i, state in empty.states.items()}
    memory = StoredMemory(states, empty.open_segments, empty.adapter)
    return Job(f"tenant {user % 4}", memory, tuple(Token(id, True) for id in ids), Sampling(tokens))


def one_at_a_time(scheduler: Scheduler, jobs: Sequence[Job]) -> list[Completion]:
    return [scheduler.submit(job).result() for job in jobs]


def all_at_once(scheduler: Scheduler, jobs: Sequence[Job]) -> list[Completion]:
    tickets = [scheduler.submit(job) for job in jobs]
    return [ticket.result() for ticket in tickets]


def faster_together(scheduler: Scheduler, jobs: Sequence[Job], repeats: int) -> tuple[Rows, list[list[float]]]:
    ends: dict[str, list[Completion]] = {"one": [], "all": []}

    def one() -> Seconds:
        return timed(lambda: ends["one"].extend(one_at_a_time(scheduler, jobs)))

    def together() -> Seconds:
        return timed(lambda: ends["all"].extend(all_at_once(scheduler, jobs)))

    medians, ratios = compare(one, together, repeats)
    one_round, all_round = ([end.answer.tokens for end in found[-len(jobs) :]] for found in ends.values())
    if one_round != all_round:
        raise SystemExit("The answers differ, so the comparison is not valid.")
    rows = []
    names = ("one at a time", f"{len(jobs)} at once")
    for name, seconds, completions in zip(names, medians, ends.values(), strict=True):
        tokens = sum(job.sampling.max_new_tokens for job in jobs)
        first = [end.first_token * 1e3 for end in completions]
        quantiles = np.quantile(first, (0.5, 0.95))
        rows.append((name, f"{tokens / seconds:,.0f}", *(f"{value:.0f} ms" for value in quantiles)))
    return rows, ratios


def beside_the_model(scheduler: Scheduler, jobs: Sequence[Job], repeats: int) -> tuple[Rows, list[list[float]]]:
    """Compare a decode step of the scheduler, with all its work for the rows, with `engine.step` on the same tokens.

    The scheduler's steps are the difference between whole answers and their first quarters.
    """
    engine, tokens = scheduler.engine, jobs[0].sampling.max_new_tokens
    steps = tokens - tokens // 4
    first = [replace(job, sampling=Sampling(tokens // 4)) for job in jobs]
    prompts = [read(engine, job) for job in jobs]
    answers = np.array([end.answer.tokens for end in all_at_once(scheduler, jobs)])
    width = max(len(job.tokens) for job in jobs)
    padded = np.array([[0] * (width - len(job.tokens)) + [1] * len(job.tokens) for job in jobs], np.int64)
    writes = np.ones((len(jobs), 1), bool)

    def alone() -> Seconds:
        past, mask, seconds = engine.join(prompts), padded, np.zeros(2)
        for number in range(tokens):
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
            arguments = past, answers[:, number : number + 1], mask, writes
            began = time.perf_counter(), time.process_time()
            past = engine.step(*arguments)[1]
            if number >= tokens - steps:
                seconds += time.perf_counter() - began[0], time.process_time() - began[1]
        clock, of_processor = seconds / steps
        return clock, of_processor

    def scheduled() -> Seconds:
        whole, beginning = (timed(lambda asked=asked: all_at_once(scheduler, asked)) for asked in (jobs, first))
        return (whole[0] - beginning[0]) / steps, (whole[1] - beginning[1]) / steps

    medians, ratios = compare(scheduled, alone, repeats)
    rows = zip(("the scheduler's", "`engine.step`"), medians, strict=True)
    return [(name, f"{seconds * 1e3:.2f} ms") for name, seconds in rows], ratios


def model_alone(engine: OnnxModel, jobs: Sequence[Job], repeats: int) -> list[list[float]]:
    """Measure the gain from batching in the model's own steps, after the prompts, against one step per job."""
    parts, token = [past_row(engine, job) for job in jobs], Token(jobs[0].tokens[0].id, True)

    def steps(rows: int) -> Seconds:
        group = engine.group()
        group.exchange((), parts[:rows])
        group.step([token] * rows)  # binds its buffers
        return timed(lambda: [group.step([token] * rows) for _ in range(count)])

    def one_row() -> Seconds:
        clock, of_processor = zip(*(steps(1) for _ in jobs), strict=True)
        return sum(clock), sum(of_processor)

    count = jobs[0].sampling.max_new_tokens // 4
    return compare(one_row, lambda: steps(len(jobs)), repeats)[1]


def past_row(engine: OnnxModel, job: Job) -> PastRow:
    """Return a row after its prompt."""
    return PastRow(read(engine, job), 1, len(job.tokens), 0, len(job.tokens))


def read(engine: OnnxModel, job: Job) -> Past:
    """Return the past of one row after its prompt."""
    return feed(engine, engine.start(job.memory), np.zeros((1, 0), np.int64), [job.tokens])[1]


def joining(engine: OnnxModel, jobs: Sequence[Job], repeats: int) -> Rows:
    """Measure the cost of one row leaving and another joining, and that of a step of all rows."""
    parts = [past_row(engine, job) for job in jobs]
    tokens, rows = [Token(job.tokens[0].id, True) for job in jobs], []
    for name, group in (("slots", engine.group()), ("copies of all rows", PaddedGroup(engine))):
        group.exchange((), parts)
        exchanges, steps = [], []
        for repeat in range(repeats):
            steps.append(timed(lambda group=group: group.step(tokens))[1])
            leaving = repeat % len(jobs)
            exchanges.append(timed(lambda: group.exchange([leaving], parts[:1]))[1])  # noqa: B023
        exchange, step = statistics.median(exchanges), statistics.median(steps)
        rows.append((name, f"{exchange * 1e3:.2f} ms", f"{step * 1e3:.2f} ms"))
    return rows


def longest_gaps(engine: OnnxModel, jobs: Sequence[Job], length: int) -> Rows:
    """Measure how long another answer waits for a token while a long prompt is read, in pieces and as a whole."""
    *others, last = (replace(job, sampling=Sampling(BESIDE)) for job in jobs)
    ids = [token.id for token in last.tokens]
    long = replace(last, tokens=tuple(Token(ids[i % len(ids)], True) for i in range(length)))
    rows = []
    for name, piece in ((f"of {PIECE} tokens", PIECE), ("none", length)):
        with Scheduler(engine, max_batch=len(jobs), piece=piece, cache_bytes=0) as scheduler:
            watched = [iter(scheduler.submit(job)) for job in others][-1]
            next(watched)
            scheduler.submit(long)
            gaps = np.diff([time.process_time() for _ in watched])
        rows.append((name, f"{np.median(gaps) * 1e3:.1f} ms", f"{max(gaps) * 1e3:.0f} ms"))
    return rows


if __name__ == "__main__":
    main()
