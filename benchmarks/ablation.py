"""Make the runs of ablations, store their results, and write tables and plots."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from ablation_plan import SEED, Ablation, Variant
from ablation_report import draw, markdown
from ablation_runs import CPU, Run, append_run, read_runs

from deltamem_tool.adapter.load import load
from deltamem_tool.base_model.tokenizer import tokenizer_of
from deltamem_tool.errors import ConfigError, DeltaMemError
from deltamem_tool.evaluation import MEMORY_ONLY
from deltamem_tool.evaluation.conditions import CONTROLS, PERMUTED_STATE, STATE, EvalProtocol
from deltamem_tool.evaluation.memories import has_layers_to_permute
from deltamem_tool.evaluation.processes import Processes
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.tasks.recall import Recall
from deltamem_tool.io.atomic import check_writable, write_atomically
from deltamem_tool.io.formats import versions
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.recipe.load import Recipe
from deltamem_tool.training import train
from deltamem_tool.training.run_folder import file_digest, flat_options

ADAPTERS = "adapters"  # subfolder of the kept adapters

Report = Callable[[str, int, int, str], object]  # name of the run, steps done, total steps, note


@dataclass(frozen=True)
class Questions:
    """The questions for every adapter: `episodes` conversations for each number of `facts`.

    Raises:
        ConfigError: a number of facts is invalid, or there are fewer than two conversations.
    """

    facts: tuple[int, ...]
    episodes: int

    def __post_init__(self) -> None:
        self.task()  # raises before anything is trained
        if self.episodes < 2:
            raise ConfigError(
                f"{self.episodes} conversation is too few.",
                "A control answers with the memory of another conversation.",
                "Pass --episodes 2 or more.",
            )

    def task(self) -> Recall:
        return Recall(self.facts, self.episodes)


@dataclass(frozen=True)
class Job:
    """A run to make. Ablations share identical jobs, such as the unchanged recipe."""

    variant: Variant
    seed: int
    recipe: Recipe
    key: str

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"


@dataclass(frozen=True)
class AblationResult:
    """All runs, and the jobs whose adapters should be kept but are missing: an earlier call did not keep them."""

    runs: list[Run]
    unkept: list[Job]


def plan_jobs(
    ablations: Sequence[Ablation],
    seeds: Sequence[int],
    changes: Sequence[str],
    questions: Questions,
    folder: Path,
) -> dict[tuple[str, str, int], Job]:
    """Return the jobs of all ablations, variants and seeds, seed by seed, so that complete tables exist early.

    Raises:
        ConfigError: a recipe is invalid or trains a LoRA; two ablations have the same name; two variants of an
            ablation are the same run; a seed is repeated; or `changes` set the seed.
    """
    names = [ablation.name for ablation in ablations]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"Two ablations are called {name}.",
                "Their tables would overwrite each other.",
                "Rename one of the files.",
            )
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"A seed is given twice: {', '.join(map(str, seeds))}.", "", "List every seed once.")
    if any(change.partition("=")[0].strip() == SEED for change in changes):
        raise ConfigError(
            f"{SEED} cannot be set with --set.", "Every variant is trained with each of the seeds.", "Pass --seeds."
        )
    jobs = {}
    for seed in seeds:
        for ablation in ablations:
            by_key: dict[str, str] = {}
            for variant in ablation.variants:
                recipe = variant.load(changes, seed, "adapter")
                if recipe.lora is not None:
                    raise ConfigError(
                        f"The variant {variant.name} of {ablation.name} trains a LoRA.",
                        "An ablation evaluates a memory.",
                        "Use a recipe without `lora:`.",
                    )
                key = _key(recipe, questions)
                same = by_key.setdefault(key, variant.name)
                if same != variant.name:
                    raise ConfigError(
                        f"The variants {same} and {variant.name} of {ablation.name} are the same run.",
                        "The table would show one run as two.",
                        "Leave out the --set that overrides what they change, or correct the file.",
                    )
                placed = variant.load(changes, seed, str(folder / ADAPTERS / key))
                jobs[ablation.name, variant.name, seed] = Job(variant, seed, placed, key)
    return jobs


def _key(recipe: Recipe, questions: Questions) -> str:
    """Return a hash of everything that the results of a run depend on."""
    parts: list[object] = [flat_options(recipe), questions.facts, questions.episodes]
    digest = file_digest(recipe.data.path)
    if digest is not None:
        parts.append(digest)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def ablate(
    ablations: Sequence[Ablation],
    out: Path,
    seeds: Sequence[int],
    questions: Questions,
    changes: Sequence[str] = (),
    keep_adapters: bool = False,
    report: Report | None = None,
    ended: Callable[[int, int], None] | None = None,
) -> AblationResult:
    """Make the runs that are missing in `out`. After each one, write a table and a plot of every ablation.

    Args:
        ablations: the ablations.
        out: folder of tables, plots and runs.
        seeds: seeds of the training runs.
        questions: the questions for every adapter.
        changes: `key=value`, applied to every recipe.
        keep_adapters: keep adapters in `out/adapters`, named by key. Existing runs are not repeated for this.
        report: called with the progress of a run.
        ended: called with the number of finished runs and the total.

    Raises:
        DeltaMemError: a recipe is invalid, `out` cannot be written, or a run failed.
    """
    check_writable(out / "table")
    processes = Processes.from_model(None)
    jobs = plan_jobs(ablations, seeds, changes, questions, out)
    unique = {job.key: job for job in jobs.values()}
    runs = processes.from_main(read_runs(out) if processes.is_main else {})
    for number, (key, job) in enumerate(unique.items(), start=1):
        if key not in runs:
            runs[key] = make_run(job, questions, report or (lambda name, done, of, note: None))
            processes.all(None)  # wait until all processes are done with the adapter
            if processes.is_main:
                append_run(out, runs[key])
                if not keep_adapters:
                    shutil.rmtree(job.recipe.out)
                _write(ablations, out, seeds, jobs, runs, changes)
        if ended is not None:
            ended(number, len(unique))
    if processes.is_main:
        _write(ablations, out, seeds, jobs, runs, changes)
        with suppress(OSError):  # not empty if it holds adapters
            (out / ADAPTERS).rmdir()
    unkept = [job for job in unique.values() if keep_adapters and not Path(job.recipe.out).exists()]
    return AblationResult([runs[key] for key in unique], unkept)


def _write(
    ablations: Sequence[Ablation],
    out: Path,
    seeds: Sequence[int],
    jobs: Mapping[tuple[str, str, int], Job],
    runs: Mapping[str, Run],
    changes: Sequence[str],
) -> None:
    for ablation in ablations:
        by_variant = {}
        for variant in ablation.variants:
            keys = [jobs[ablation.name, variant.name, seed].key for seed in seeds]
            finished = [runs[key] for key in keys if key in runs]
            if finished:
                by_variant[variant.name] = finished
        if by_variant:
            plot = f"{ablation.name}.png"
            draw(ablation, by_variant, out / plot)
            write_atomically(out / f"{ablation.name}.md", markdown(ablation, by_variant, changes, plot).encode())


def make_run(job: Job, questions: Questions, report: Report) -> Run:
    """Train and evaluate an adapter. It stays in the recipe's `out`."""
    name = job.name
    started = time.process_time()
    try:
        trained = train(
            job.recipe,
            overwrite=True,
            report=lambda done, of, loss: report(name, done, of, "" if loss is None else f"loss {loss:.3f}"),
        )
    except DeltaMemError as error:  # its advice is for `deltamem train`
        next = "Correct the ablation if it is at fault. To continue with this run, repeat the command."
        raise DeltaMemError(f"{name}: {error.what}", error.why, next) from error
    processor = time.process_time() - started
    on_gpu = torch.cuda.is_available()  # then the training was there too
    model = load(job.recipe.out)
    cast(torch.nn.Module, model).to("cuda" if on_gpu else "cpu")  # transformers hides the signature
    controls = set(CONTROLS)
    if not has_layers_to_permute(adapter_of(model).memory_shape):
        controls.remove(PERMUTED_STATE)
    evaluation = evaluate(
        model,
        tokenizer_of(model),
        questions.task(),
        EvalProtocol.parse(MEMORY_ONLY),
        only={STATE, *controls},
        report=lambda note, done, of: report(name, done, of, note),
    )
    metric = evaluation.metrics[0]
    scores = {
        condition.name: [evaluation.estimate(metric, condition.name, group).mean for group in evaluation.groups]
        for condition in evaluation.conditions
    }
    return Run(
        key=job.key,
        seed=job.seed,
        facts=list(questions.facts),
        episodes=questions.episodes,
        scores=scores,
        recipe=flat_options(job.recipe),
        steps=trained.steps,
        parameters=trained.parameters,
        state_bytes=adapter_of(model).empty_memory(1).nbytes,
        loss=trained.losses[-1][1],
        minutes=round(trained.seconds / 60, 2),
        processor_minutes=round(processor / 60, 2),
        threads=torch.get_num_threads(),
        versions=versions(),
        date=time.strftime("%Y-%m-%d"),
        device=torch.cuda.get_device_name() if on_gpu else CPU,
    )
