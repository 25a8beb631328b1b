"""Measure where in an answer a memory shows whether a fact was told.

Command: python benchmarks/untold.py ADAPTER [--episodes 120] [--seed 7]

Every fact of a plain conversation is asked for, and as many that were not told, with held-out words. All questions are
answered as if the fact had been told ("Your dentist is Ines Keller."), and the readings of all layers are kept at two
tokens: the last one before the answer, and the last one before the value, or before its preposition ("is at"). A ridge
regression, trained on the other four fifths of the conversations, tells told facts from others by these readings; the
table has the area under its ROC curve: 0.5 is chance.
"""

from __future__ import annotations

import random

import click
import numpy as np
import torch
from numpy.typing import NDArray

import deltamem_tool as deltamem
from deltamem_tool.base_model.tokenizer import tokenizer_of
from deltamem_tool.cli import main
from deltamem_tool.cli.console import progress
from deltamem_tool.data.collate import collate
from deltamem_tool.data.encode import Encoder
from deltamem_tool.data.episode import Episode
from deltamem_tool.data.fact_conversations import fact_history, question_exchange
from deltamem_tool.data.fact_words import EVERYTHING
from deltamem_tool.data.facts import Fact, sample_facts, untold_fact
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.training.loss import EpisodeModel

FACTS, THIRD_PERSON, FORM = 4, 0.25, "plain"  # at most so many facts in a conversation
FOLDS, RIDGE = 5, 1000.0
PLACES = ("before the answer", "before the value")


def conversation(seed: str) -> tuple[Episode, list[tuple[Fact, bool]]]:
    """Return a conversation with its questions, and for each of them the fact and whether it was told."""
    rng = random.Random(seed)
    told = sample_facts(rng, rng.randint(1, FACTS), EVERYTHING, THIRD_PERSON)
    untold = [untold_fact(rng, told, EVERYTHING, THIRD_PERSON) for _ in told]
    asked = [(fact, is_told) for facts, is_told in ((told, True), (untold, False)) for fact in facts]
    exchanges = [question_exchange(rng, fact, FORM, EVERYTHING) for fact, _ in asked]
    return Episode(fact_history(rng, told, FORM, EVERYTHING), exchanges, seed), asked


class Readings:
    """Readings of a model with a memory, of tokens in the answers of conversations."""

    def __init__(self, adapter: str) -> None:
        self.model = deltamem.load(adapter)
        self.tokenizer = tokenizer_of(self.model)
        self.encoder = Encoder(self.tokenizer, max_write_tokens=2048, max_read_tokens=512)
        self.episode_model = EpisodeModel(self.model)

    @torch.no_grad()
    def at_places(self, episode: Episode, facts: list[Fact]) -> NDArray[np.float32]:
        """Return the readings of all layers `[Q, P, L·H·R]` at each of `PLACES`, for a question about each fact."""
        batch = collate(self.encoder([episode]), self.encoder.pad, segments=False)
        memory = self.episode_model.write(batch["write_ids"], batch["write_mask"]).memory
        layers: list[torch.Tensor] = []  # [Q, T, H·R] each
        adapter = adapter_of(self.model)
        handles = [
            adapter.layer(index).register_forward_hook(lambda module, args, output: layers.append(output.readings))
            for index in adapter.layer_indices
        ]
        self.episode_model.answer(memory.select(batch["rows"]), batch["read_ids"], batch["read_mask"], batch["scored"])
        for handle in handles:
            handle.remove()
        readings = torch.cat(layers, dim=-1)
        rows, columns = batch["scored"] // readings.shape[1], batch["scored"] % readings.shape[1]
        places = []
        for row, fact in enumerate(facts):
            first = int(columns[rows == row][0])
            places.append([first, first + self._prefix_length(fact)])
        return np.stack([readings[row, place].numpy() for row, place in enumerate(places)])

    def _prefix_length(self, fact: Fact) -> int:
        """The number of tokens of an answer before the value and its preposition."""
        before = fact.answer[: fact.answer.index(fact.value)].rstrip()
        before = before.removesuffix(fact.kind.is_.removeprefix("is")) if fact.kind.clause == "is" else before
        return len(self.tokenizer(before, add_special_tokens=False).input_ids)


def area(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """Return the area under the ROC curve: the probability that a told fact scores higher than an untold one."""
    told, untold = scores[labels], scores[~labels]
    return float((told[:, None] > untold).mean() + (told[:, None] == untold).mean() / 2)


def held_out_scores(
    x: NDArray[np.float32], labels: NDArray[np.bool_], conversations: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the scores `[N]` of a ridge regression on readings `[N, F]`, each from the other folds' conversations."""
    y, scores = np.where(labels, 1.0, -1.0), np.zeros(len(x))
    for fold in range(FOLDS):
        held_out = conversations % FOLDS == fold
        mean, spread = x[~held_out].mean(0), x[~held_out].std(0) + 1e-6
        seen, asked = ((part - mean) / spread for part in (x[~held_out], x[held_out]))
        weights = np.linalg.solve(seen @ seen.T + RIDGE * np.eye(len(seen)), y[~held_out])
        scores[held_out] = asked @ (seen.T @ weights)
    return scores


@click.command()
@click.argument("adapter")
@click.option("--episodes", default=120, show_default=True, help="Number of conversations.")
@click.option("--seed", default=7, show_default=True, help="Seed of the conversations.")
def command(adapter: str, episodes: int, seed: int) -> None:
    """Print the area under the ROC curve of a probe of the readings, at two places of an answer."""
    readings, parts, labels, conversations = Readings(adapter), [], [], []
    with progress() as bar:
        task = bar.add_task("Conversations", total=episodes, note="")
        for number in range(episodes):
            episode, asked = conversation(f"{seed}/{number}")
            parts.append(readings.at_places(episode, [fact for fact, _ in asked]))
            labels += [is_told for _, is_told in asked]
            conversations += [number] * len(asked)
            bar.update(task, advance=1)
    x, told = np.concatenate(parts), np.array(labels)
    click.echo(f"{adapter}: {told.sum()} told facts, {(~told).sum()} untold ones\n")
    click.echo("| readings | told or untold, area under the ROC curve |\n|---|---|")
    for place, name in enumerate(PLACES):
        click.echo(f"| {name} | {area(told, held_out_scores(x[:, place], told, np.array(conversations))):.2f} |")


if __name__ == "__main__":
    main(command)
