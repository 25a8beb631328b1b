"""What is measured, and how: all that a process of its own needs to do the same again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.bench import BASE, DECODED, MODELS, ONNX, PROMPTS, PYTORCH, REPEATS, RUNTIMES
from deltamem_tool.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """
    Args:
        adapter: an adapter folder or a Hub id.
        base: where the base model is, if not where the adapter says.
        lora: a PEFT adapter folder or a Hub id; None for a fresh LoRA of about the memory's size.
        onnx: an export of the adapter; None to make one.
        models: some of `MODELS`, the base among them.
        runtimes: some of `RUNTIMES`.
        prompts: numbers of tokens.
        decode: tokens after the first one.
        batch_size: conversations at once.
        repeats: how often everything is measured.
        threads: of one call; None for the cores that this process may use.
        device: as torch names it.
        dtype: of the base's weights; None for what `onnx` has, or else the checkpoint's own.
        seed: of tokens, order and fresh weights.
        trust_remote_code: whether Python files of the base model may run.

    Raises:
        ConfigError: a list is empty, names something unknown or twice, or lacks the base; a number is not positive; or
            not every runtime can use the device.
    """

    adapter: str
    base: str | None = None
    lora: str | None = None
    onnx: str | None = None
    models: tuple[str, ...] = MODELS
    runtimes: tuple[str, ...] = (PYTORCH,)
    prompts: tuple[int, ...] = PROMPTS
    decode: int = DECODED
    batch_size: int = 1
    repeats: int = REPEATS
    threads: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _refuse_names("models", self.models, MODELS)
        _refuse_names("runtimes", self.runtimes, RUNTIMES)
        if BASE not in self.models:
            raise ConfigError("The models lack the base.", "Every ratio is to it.", f"Add {BASE} to the models.")
        if self.onnx is not None and ONNX not in self.runtimes:
            raise ConfigError(
                f"{self.onnx} would not be used.", f"The runtimes lack {ONNX}.", f"Add {ONNX} to the runtimes."
            )
        kind, _, number = self.device.partition(":")
        if kind not in ("cpu", "cuda"):
            raise ConfigError(f"Nothing is measured on {self.device} yet.", "", "Choose cpu, or cuda.")
        if ONNX in self.runtimes and number not in ("", "0"):
            raise ConfigError(
                f"ONNX Runtime would not run on {self.device}.",
                "It is given the first device.",
                "Choose cuda:0, or hide the others with CUDA_VISIBLE_DEVICES.",
            )
        if len(set(self.prompts)) < len(self.prompts) or not self.prompts:
            raise ConfigError("The prompt lengths do not hold.", "They are none, or one is there twice.", _LENGTHS)
        counts = {"prompt length": min(self.prompts), "decode": self.decode, "batch size": self.batch_size}
        for name, count in {**counts, "repeats": self.repeats, "threads": self.threads or 1}.items():
            if count < 1:
                raise ConfigError(f"The {name} is {count}.", "", "Choose 1 or more.")

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def provider(self) -> str:
        """Of ONNX Runtime."""
        return "cuda" if self.on_cuda else "cpu"

    def ids(self, prompt: int, vocab_size: int) -> NDArray:
        """Random tokens, int64 `[B, prompt]`, the same for whoever asks."""
        random = np.random.default_rng((self.seed, prompt))
        return random.integers(vocab_size, size=(self.batch_size, prompt), dtype=np.int64)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setting:
        """The inverse of `to_json`."""
        said: dict[str, Any] = json.loads(text)
        for name, value in said.items():
            said[name] = tuple(value) if isinstance(value, list) else value
        return cls(**said)


_LENGTHS = "Name numbers of tokens, such as 512,2048."


def _refuse_names(what: str, named: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in named if name not in known]
    if unknown or not named or len(set(named)) < len(named):
        why = f"There is no {unknown[0]!r}." if unknown else "They are none, or one is there twice."
        raise ConfigError(f"The {what} cannot be {','.join(named)!r}.", why, f"Name some of {','.join(known)}.")


def name_of(runtime: str, model: str) -> str:
    """What a side is called in results, such as "pytorch memory"."""
    return f"{runtime} {model}"
