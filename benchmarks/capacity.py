"""Measure how much a memory holds and how later writes affect it, and compare this with predictions of the delta rule.

    python benchmarks/capacity.py --out benchmarks/results/DATE-capacity.md --plots docs
    python benchmarks/capacity.py TSW=tsw-adapter SSW=ssw-adapter MSW=msw-adapter --out OUT.md

Each adapter answers conversations of the recall task: with more and more facts, and with more and more text after a
fact was told or changed. `docs/capacity.md` explains the predictions. Each point is added to the `.jsonl` beside OUT
when it is done, and an interrupted run continues from there. Tables and plots are rewritten at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from capacity_plot import KEYS, draw_adapter, draw_comparison
from capacity_replay import Prototypes, predict

from deltamem_tool.adapter.load import load
from deltamem_tool.base_model.tokenizer import tokenizer_of
from deltamem_tool.bench.timing import cpu_name
from deltamem_tool.cli.console import progress
from deltamem_tool.data.dialogues import UNKNOWN
from deltamem_tool.evaluation.conditions import STATE, EvalProtocol
from deltamem_tool.evaluation.result import Evaluation
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.task import Item
from deltamem_tool.evaluation.tasks.recall import CHANGED, OTHER_FACTS, SMALL_TALK, STATED, Recall
from deltamem_tool.io.atomic import write_atomically
from deltamem_tool.memory.attach import adapter_of

PROTOCOL = EvalProtocol.parse("memory")
CONTROLS = ("donor_state", "zero_state")
SESSION = 8  # turns per context: about as many as the backbone and its adapters were trained on
DEFAULT = "shipped=builtin:adapter"
FACTS = (1, 2, 4, 6, 8, 12, 16, 24)
TALK = (0, 4, 8, 16, 32, 64)
TOLD_SINCE = (0, 2, 4, 8, 16, 32)
CHANGED_FACTS = (1, 2, 4, 8, 16)
TALK_SINCE_CHANGE, TOLD_SINCE_CHANGE = (0, 8, 32, 64), (0, 4, 8, 16)

Point = dict[str, Any]  # one line of the .jsonl


@dataclass(frozen=True)
class Curve:
    """Points of the recall task along one of its options."""

    name: str
    title: str
    along: str  # the option that varies
    values: Sequence[int]
    options: Mapping[str, Any]  # the other options


CURVES = (
    Curve("facts", "facts told", "facts", FACTS, {"kind": STATED}),
    Curve("small talk", "one fact, then small talk", "delay", TALK, {"facts": 1, "between": SMALL_TALK}),
    Curve("other facts", "one fact, then other facts", "delay", TOLD_SINCE, {"facts": 1, "between": OTHER_FACTS}),
    Curve("changed, facts", "facts told, one changed at the end", "facts", CHANGED_FACTS, {"kind": CHANGED}),
    Curve(
        "changed, small talk",
        "one fact, changed, then small talk",
        "delay",
        TALK_SINCE_CHANGE,
        {"facts": 1, "kind": CHANGED, "between": SMALL_TALK},
    ),
    Curve(
        "changed, other facts",
        "one fact, changed, then other facts",
        "delay",
        TOLD_SINCE_CHANGE,
        {"facts": 1, "kind": CHANGED, "between": OTHER_FACTS},
    ),
)


def measure(model: Any, tokenizer: Any, prototypes: Prototypes, curve: Curve, value: int, shared: Point) -> Point:
    """Measure one point: exact matches (and old values) with the state and its controls, and the predictions."""
    options = {**curve.options, curve.along: value, "session": SESSION}
    task = Recall(episodes=shared["episodes"], seed=shared["seed"], **options)
    found = evaluate(model, tokenizer, task, PROTOCOL, only=(STATE, *CONTROLS), seed=shared["seed"])
    measured = {}
    for metric in task.metrics:
        for condition in (STATE, *CONTROLS):
            one = found.estimate(metric, condition)
            measured[f"{metric}, {condition}"] = [one.mean, one.low, one.high]
    wrong = wrong_answers(task.items(), found)
    predicted = predict(model, tokenizer, task.items(), prototypes, shared["seed"])
    return {**shared, "curve": curve.name, "value": value, "measured": measured, "wrong": wrong, "predicted": predicted}


def wrong_answers(items: Sequence[Item], found: Evaluation) -> dict[str, float]:
    """Return two shares of the answers with the state: those that say that nothing was told, and those with another
    value that was told, either that of another fact or an earlier one of the same fact."""
    histories = {item.id: " ".join(message["content"] for one in item.history for message in one) for item in items}
    mine = [record for record in found.records if record.condition == STATE and not record.scores["exact"]]
    unknown = [record for record in mine if record.answer.startswith(UNKNOWN.partition("{")[0])]
    values = [(record.answer.rstrip(".").split() or [""])[-1] for record in mine]
    told = [one for one, value in zip(mine, values, strict=True) if value and f" {value}" in histories[one.item]]
    count = len(items)
    return {"unknown": len(unknown) / count, "told": len([one for one in told if one not in unknown]) / count}


def missing(points: Sequence[Point], shared: Point) -> Iterator[tuple[Curve, int]]:
    done = {(point["curve"], point["value"]) for point in points if _is_of(point, shared)}
    for curve in CURVES:
        for value in curve.values:
            if (curve.name, value) not in done:
                yield curve, value


def _is_of(point: Point, shared: Point) -> bool:
    return all(point[key] == shared[key] for key in ("fingerprint", "episodes", "seed"))


def report(points: Sequence[Point], names: Sequence[str], command: str) -> str:
    """Return the results as Markdown: a table per curve, with the adapters below each other."""
    some = points[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        f"# Capacity and interference, {max(point['date'] for point in points)}",
        "",
        f"{some['episodes']} conversations per point, seed {some['seed']}, from the memory alone; {packages};",
        f"{cpu_name()}.",
        "",
        f"`{command}`",
        "",
        "The predictions are explained in [docs/capacity.md](../../docs/capacity.md). Intervals are at 95 %.",
        "",
        "* measured: exact matches of the answers, then with the old value, with another's state and with no state",
        "* nearest value: the value whose reading, after a single fact, is nearest to what the layers read",
        "* random keys: the same for a replay in which every other write has a random key",
        "* rotated keys: the same for a replay in which all other keys of a state are rotated together, so that",
        "  repeated keys stay repeated",
        "* unknown, told: answers that nothing was told, and answers with another value that was told",
        "* left: share of the fact's reading that is left; with random keys, Π (keep − erase / R); with rotated keys",
        "* gate, overlap: mean erase gate β of later writes, and mean (k · q)², which is 1 / R for random keys",
        "",
    ]
    for name in names:
        mine = [point for point in points if point["name"] == name]
        config = mine[0]["config"]
        lines += [
            f"## {name}",
            "",
            f"{config['state_heads']} state{'s' * (config['state_heads'] > 1)} of {config['rank']}×{config['rank']} a "
            f"layer, one write per {config['granularity']}, rule `{config['update_rule']}`, branches "
            f"{', '.join(config['heads'])}; 1 / R = {1 / config['rank']:.3f}.",
            "",
        ]
        for curve in CURVES:
            lines += [f"**{curve.title}**", "", *_table(curve, mine), ""]
    return "\n".join(lines)


def _table(curve: Curve, points: Sequence[Point]) -> Iterator[str]:
    is_changed = curve.options.get("kind") == CHANGED
    heads = [
        "facts" if curve.along == "facts" else "turns",
        "tokens since",
        "measured",
        "nearest value",
        "random keys",
        "rotated keys",
    ]
    heads += ["old", "old, nearest", "old, random", "old, rotated"] if is_changed else []
    yield _row([*heads, "donor", "zero", "unknown", "told", "left", "left, random", "left, rotated", "gate", "overlap"])
    yield _row(["---"] * (len(heads) + 9))
    for point in sorted((p for p in points if p["curve"] == curve.name), key=lambda p: p["value"]):
        measured, predicted = point["measured"], point["predicted"]
        mean, low, high = measured["exact, state"]
        cells = [str(point["value"]), f"{predicted['tokens since']:.0f}", f"**{mean:.2f}** ({low:.2f}–{high:.2f})"]
        cells += [f"{predicted[f'exact, {keys} keys']:.2f}" for keys in KEYS]
        if is_changed:
            cells.append(f"{measured['old, state'][0]:.2f}")
            cells += [f"{predicted[f'old, {keys} keys']:.2f}" for keys in KEYS]
        cells += [f"{measured[f'exact, {control}'][0]:.2f}" for control in CONTROLS]
        cells += [f"{point['wrong'][name]:.2f}" for name in ("unknown", "told")]
        cells += [f"{predicted[f'left, {keys} keys']:.2f}" for keys in KEYS]
        since = [predicted[name] for name in ("gate", "overlap")]
        yield _row([*cells, *("" if mean is None else f"{mean:.3f}" for mean in since)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _adapters(said: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in said or (DEFAULT,):
        name, equals, place = text.partition("=")
        if not equals or not name or not place or name in found:
            raise click.BadParameter(f"{text!r} is not NAME=ADAPTER with a unique name", param_hint="ADAPTERS")
        found[name] = place
    return found


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("adapters", nargs=-1, metavar="[NAME=ADAPTER]...")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Markdown file to write.")
@click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the PNG files.  [default: that of OUT]",
)
@click.option("--episodes", default=100, show_default=True, type=click.IntRange(10), help="Conversations per point.")
@click.option("--seed", default=0, show_default=True, help="Random seed.")
def main(adapters: tuple[str, ...], out: Path, plots: Path | None, episodes: int, seed: int) -> None:
    chosen = _adapters(adapters)
    plots = plots or out.parent
    for folder in (out.parent, plots):
        folder.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".jsonl")
    kept: list[Point] = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    points: list[Point] = []
    with progress() as bar:
        whole = bar.add_task("Points", total=len(chosen) * sum(len(curve.values) for curve in CURVES), note="")
        for name, place in chosen.items():
            model = load(place)
            tokenizer, adapter = tokenizer_of(model), adapter_of(model)
            shared = {"fingerprint": adapter.fingerprint, "episodes": episodes, "seed": seed}
            mine = [{**point, "name": name} for point in kept if _is_of(point, shared)]
            bar.advance(whole, len(mine))
            prototypes = Prototypes(model, tokenizer, seed)
            for curve, value in missing(mine, shared):
                bar.update(whole, note=f"{name}: {curve.title}, {value}")
                point = measure(model, tokenizer, prototypes, curve, value, shared)
                point |= {"name": name, "config": adapter.config.to_dict(), "threads": torch.get_num_threads()}
                point["date"] = time.strftime("%Y-%m-%d")
                mine.append(point)
                with log.open("a") as file:
                    file.write(json.dumps(point) + "\n")
                bar.advance(whole)
            points += mine
    said = " ".join(f"{name}={place}" for name, place in chosen.items())
    said += f" --episodes {episodes} --seed {seed}"
    write_atomically(out, report(points, list(chosen), f"python benchmarks/capacity.py {said} --out OUT.md").encode())
    for name in chosen:
        draw_adapter([point for point in points if point["name"] == name], CURVES, plots / f"capacity-{name}.png")
    if len(chosen) > 1:
        draw_comparison(points, CURVES, plots / "capacity.png")
    click.echo(f"{out}, {log}, plots in {plots}")


if __name__ == "__main__":
    main()
