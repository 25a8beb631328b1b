"""Every variant of some ablations, over seeds: train, ask, keep what came out, draw."""

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

from deltamem_tool.ablation.plan import SEED, Ablation, Variant
from deltamem_tool.ablation.report import draw, markdown
from deltamem_tool.ablation.runs import CPU, Run, keep, read_runs
from deltamem_tool.adapter.load import load
from deltamem_tool.base_model.tokenizer import tokenizer_of
from deltamem_tool.errors import ConfigError, DeltaMemError
from deltamem_tool.evaluation import MEMORY_ONLY
from deltamem_tool.evaluation.conditions import CONTROLS, STATE, EvalProtocol
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.tasks.recall import Recall
from deltamem_tool.io.atomic import refuse_unwritable, write_whole
from deltamem_tool.io.formats import versions
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.recipe.load import Recipe
from deltamem_tool.training import train
from deltamem_tool.training.run_folder import comparable, data_digest

ADAPTERS = "adapters"  # the folder of those that are kept

Report = Callable[[str, int, int, str], None]  # which run, done, of, what of it is being done


@dataclass(frozen=True)
class Questions:
    """What every adapter is asked: `episodes` conversations for each number of `facts`.

    Raises:
        ConfigError: one of the numbers cannot be.
    """

    facts: tuple[int, ...]
    episodes: int

    def __post_init__(self) -> None:
        self.task()  # what it refuses is refused before anything is trained
        if self.episodes < 2:
            raise ConfigError(
                f"{self.episodes} conversation is too few.", "A control is another's memory.", "Take 2 or more."
            )

    def task(self) -> Recall:
        return Recall(self.facts, self.episodes)


@dataclass(frozen=True)
class Wanted:
    """A run that some ablation needs. Ablations share those that are the same, such as the recipe with no change."""

    variant: Variant
    seed: int
    recipe: Recipe
    key: str

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"


@dataclass(frozen=True)
class Ablated:
    """What `ablate` has made or found.

    Args:
        unkept: runs whose adapters are wanted and not there: they were made before, and the adapters not kept.
    """

    runs: list[Run]
    unkept: list[Wanted]


def wanted(
    ablations: Sequence[Ablation],
    seeds: Sequence[int],
    changes: Sequence[str],
    questions: Questions,
    folder: Path,
) -> dict[tuple[str, str, int], Wanted]:
    """By ablation, variant and seed; seed by seed, so that whole tables are there early.

    Raises:
        ConfigError: a recipe does not hold, or trains no memory; two ablations have one name, or two variants of one
            are the same run; a seed is there twice; or `changes` set the seed.
    """
    names = [ablation.name for ablation in ablations]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two ablations are called {name}.", "So would be their tables.", "Rename a file.")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"The seeds {', '.join(map(str, seeds))} do not hold.", "One is there twice.", "Leave it out."
        )
    if any(change.partition("=")[0].strip() == SEED for change in changes):
        raise ConfigError(f"{SEED} cannot be set.", "Every variant is trained with each of the seeds.", "Pass --seeds.")
    found = {}
    for seed in seeds:
        for ablation in ablations:
            by_key: dict[str, str] = {}
            for variant in ablation.variants:
                recipe = variant.load(changes, seed, "adapter")
                if recipe.lora is not None:
                    raise ConfigError(
                        f"The variant {variant.name} of {ablation.name} trains a LoRA.",
                        "What is asked is asked of a memory.",
                        "Take a recipe without `lora:`.",
                    )
                key = _key(recipe, questions)
                same = by_key.setdefault(key, variant.name)
                if same != variant.name:
                    raise ConfigError(
                        f"The variants {same} and {variant.name} of {ablation.name} are the same run.",
                        "A table would tell them apart.",
                        "Leave out the --set that overrides what they change, or correct the file.",
                    )
                placed = variant.load(changes, seed, str(folder / ADAPTERS / key))
                found[ablation.name, variant.name, seed] = Wanted(variant, seed, placed, key)
    return found


def _key(recipe: Recipe, questions: Questions) -> str:
    """Names everything that a run's figures depend on."""
    said: list[object] = [comparable(recipe), questions.facts, questions.episodes]
    digest = data_digest(recipe)
    if digest is not None:
        said.append(digest)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def ablate(
    ablations: Sequence[Ablation],
    out: Path,
    seeds: Sequence[int],
    questions: Questions,
    changes: Sequence[str] = (),
    keep_adapters: bool = False,
    report: Report | None = None,
    ended: Callable[[int, int], None] | None = None,
) -> Ablated:
    """Make the runs that are missing in `out`, and after each of them write a table and a plot of every ablation there.

    Args:
        changes: `key=value`, of every recipe.
        keep_adapters: they stay in `out/adapters`, by their runs' keys. Runs that are there are not made again for it.
        report: follows a run; `ended` their number, (done, of).

    Raises:
        DeltaMemError: a recipe does not hold, nothing can be written, or a run failed.
    """
    refuse_unwritable(out / "table")
    needed = wanted(ablations, seeds, changes, questions, out)
    different = {one.key: one for one in needed.values()}
    runs = read_runs(out)
    for number, (key, one) in enumerate(different.items(), start=1):
        if key not in runs:
            runs[key] = make_run(one, questions, report or (lambda name, done, of, note: None))
            keep(out, runs[key])
            if not keep_adapters:
                shutil.rmtree(one.recipe.out)
            _write(ablations, out, seeds, needed, runs, changes)
        if ended is not None:
            ended(number, len(different))
    _write(ablations, out, seeds, needed, runs, changes)
    with suppress(OSError):  # it holds adapters
        (out / ADAPTERS).rmdir()
    unkept = [one for one in different.values() if keep_adapters and not Path(one.recipe.out).exists()]
    return Ablated([runs[key] for key in different], unkept)


def _write(
    ablations: Sequence[Ablation],
    out: Path,
    seeds: Sequence[int],
    needed: Mapping[tuple[str, str, int], Wanted],
    runs: Mapping[str, Run],
    changes: Sequence[str],
) -> None:
    for ablation in ablations:
        mine = {}
        for variant in ablation.variants:
            keys = [needed[ablation.name, variant.name, seed].key for seed in seeds]
            some = [runs[key] for key in keys if key in runs]
            if some:
                mine[variant.name] = some
        if mine:
            plot = f"{ablation.name}.png"
            draw(ablation, mine, out / plot)
            write_whole(out / f"{ablation.name}.md", markdown(ablation, mine, changes, plot).encode())


def make_run(one: Wanted, questions: Questions, report: Report) -> Run:
    """Train and ask. The adapter stays in the recipe's `out`."""
    name = one.name
    started = time.process_time()
    try:
        trained = train(
            one.recipe,
            overwrite=True,
            report=lambda done, of, loss: report(name, done, of, "" if loss is None else f"loss {loss:.3f}"),
        )
    except DeltaMemError as error:  # its advice is for `deltamem train`
        next = "Correct the ablation if it is at fault. The same command goes on, and makes this run anew."
        raise DeltaMemError(f"{name}: {error.what}", error.why, next) from error
    processor = time.process_time() - started
    on_gpu = torch.cuda.is_available()  # then the training was there too
    model = load(one.recipe.out)
    cast(torch.nn.Module, model).to("cuda" if on_gpu else "cpu")  # transformers hides the signature
    found = evaluate(
        model,
        tokenizer_of(model),
        questions.task(),
        EvalProtocol.parse(MEMORY_ONLY),
        only=(STATE, *CONTROLS),
        report=lambda what, done, of: report(name, done, of, what),
    )
    metric = found.metrics[0]
    scores = {
        condition.name: [found.estimate(metric, condition.name, group).mean for group in found.groups]
        for condition in found.conditions
    }
    return Run(
        key=one.key,
        seed=one.seed,
        facts=list(questions.facts),
        episodes=questions.episodes,
        scores=scores,
        recipe=comparable(one.recipe),
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
