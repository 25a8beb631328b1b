"""The base models of the quickstart: the shipped backbone, or a published chat model. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deltamem_tool.base_model import smollm2
from deltamem_tool.errors import ConfigError
from deltamem_tool.io.names import BACKBONE

SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class QuickstartBase:
    """A base model, how a memory is trained for it, and how the memory is tested.

    Args:
        name: name for output.
        recipe: name of a file in `recipes/`.
        adapter: a trained adapter.
        takes_adapter: whether `adapter` is used by default, because training takes hours.
        words: option `words` of the recall task.
        form: option `form` of the recall task, if it is not the default.
        system: system prompt of all conversations; None for what the chat template adds by itself.
        facts: numbers of facts in the conversations of the recall task.
        episodes: number of conversations for each of `facts`.
        agreement: number of facts per conversation, and number of conversations, for comparing both runtimes.
        told: number of facts in the conversation that is remembered.
        batch_size: number of conversations per batch.
        fetch: function that returns the checkpoint's name, and downloads the checkpoint if it is missing.
        size_to_fetch: function that returns the size of that download for output; None if there is nothing to download.
        time: duration of a run with training on 2 CPU cores, for output.
        fast_time: duration of a run that uses `adapter`.
    """

    name: str
    recipe: str
    adapter: str
    takes_adapter: bool
    words: str
    facts: tuple[int, ...]
    episodes: int
    agreement: tuple[int, int]
    told: int
    batch_size: int
    fetch: Callable[[], str]
    size_to_fetch: Callable[[], str | None]
    time: str
    fast_time: str
    form: str | None = None
    system: str | None = None

    def task_options(self) -> dict[str, Any]:
        """Return the options of the recall task that are not its defaults, except for the number of conversations."""
        options = {"form": self.form, "system": self.system}
        return {name: value for name, value in options.items() if value is not None}


BASES = {
    BACKBONE: QuickstartBase(
        name="the shipped backbone",
        recipe="quickstart.yaml",
        adapter="builtin:adapter",
        takes_adapter=False,
        words="dialogues",
        facts=(1, 2, 4, 6, 8),
        episodes=200,
        agreement=(4, 200),
        told=4,
        batch_size=100,
        fetch=lambda: BACKBONE,
        size_to_fetch=lambda: None,
        time="2 to 5 minutes, mostly training",
        fast_time="less than a minute",
    ),
    SMOLLM2: QuickstartBase(
        name=smollm2.NAME,
        recipe="smollm2-135m-tsw.yaml",
        adapter="builtin:smollm2-adapter",
        takes_adapter=True,
        words="natural",
        facts=(1, 2, 4),
        episodes=50,
        agreement=(2, 20),
        told=2,
        batch_size=10,
        fetch=smollm2.fetch,
        size_to_fetch=smollm2.size_to_fetch,
        time="1 to 3 hours, mostly training",
        fast_time="10 to 20 minutes",
        form="plain",
    ),
}


def choose_adapter(base: str, adapter: str | None = None, fast: bool = False, steps: int | None = None) -> str | None:
    """Choose the adapter that a quickstart uses; None if it trains one.

    Args:
        base: one of BASES.
        adapter: requested adapter.
        fast: whether the base's trained adapter is requested.
        steps: requested number of training steps.

    Raises:
        ConfigError: the options cannot be combined.
    """
    if adapter is not None and fast:
        raise ConfigError("fast and adapter cannot be combined.", "Both choose the adapter.", "Leave out one of them.")
    if steps is not None and (fast or adapter is not None):
        raise ConfigError(
            "steps applies only to training.", "An existing adapter is used, and none is trained.", "Leave out steps."
        )
    if adapter is not None:
        return adapter
    return BASES[base].adapter if fast or (BASES[base].takes_adapter and steps is None) else None
