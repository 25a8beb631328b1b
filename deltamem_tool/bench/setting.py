"""The setting of a benchmark: everything that another process needs to repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.bench import BASE, DECODED, LORA, MODELS, ONNX, PROMPTS, PYTORCH, REPEATS, RUNTIMES
from deltamem_tool.config import check_seed
from deltamem_tool.errors import ConfigError
from deltamem_tool.io.cores import MAX_THREADS

_MAX_TOKENS = 2**31 - 1  # in one batch


@dataclass(frozen=True)
class Setting:
    """The options of a measurement.

    Args:
        adapter: adapter folder or Hub id.
        base: location of the base model, if it differs from the adapter's config.
        lora: folder of a PEFT adapter or Hub id; None for a random LoRA of about the memory's size.
        onnx: export of the adapter; None to create one.
        models: some of `MODELS`, including the base model.
        runtimes: some of `RUNTIMES`.
        prompts: lengths of the prompts, in tokens.
        decode: number of tokens to decode after the first one.
        batch_size: number of conversations per batch.
        repeats: number of repeats of every measurement.
        threads: threads per call; None for `OMP_NUM_THREADS`, or the cores that this process may use.
        device: device, as torch names it.
        dtype: data type of the base model's weights; None for that of `onnx`, or else that of the checkpoint.
        seed: random seed for tokens, order and weights.
        trust_remote_code: whether Python files of the base model may run.

    Raises:
        ConfigError: a list is empty, has an unknown or repeated entry, or lacks the base model; a number is not
            positive; `lora` or `onnx` would not be used; or a runtime does not support the device.
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
        _check_names("models", self.models, MODELS)
        _check_names("runtimes", self.runtimes, RUNTIMES)
        if BASE not in self.models:
            raise ConfigError(
                f"The models do not include {BASE}.", "Every ratio is relative to it.", f"Add {BASE} to the models."
            )
        for path, name, names, kind in (
            (self.lora, LORA, self.models, "models"),
            (self.onnx, ONNX, self.runtimes, "runtimes"),
        ):
            if path is not None and name not in names:
                raise ConfigError(
                    f"{path} would not be used.", f"The {kind} do not include {name}.", f"Add {name} to the {kind}."
                )
        kind, _, number = self.device.partition(":")
        if kind not in ("cpu", "cuda"):
            raise ConfigError(f"bench does not support the device {self.device}.", "", "Choose cpu or cuda.")
        if ONNX in self.runtimes and number not in ("", "0"):
            raise ConfigError(
                f"bench does not run ONNX Runtime on {self.device}.",
                "ONNX Runtime uses the first GPU.",
                "Choose cuda:0, or hide the other GPUs with CUDA_VISIBLE_DEVICES.",
            )
        if len(set(self.prompts)) < len(self.prompts) or not self.prompts:
            why = "A length is repeated." if self.prompts else "There are none."
            raise ConfigError("Invalid prompt lengths.", why, "Pass numbers of tokens, such as 512,2048.")
        counts = {"prompt length": min(self.prompts), "decode": self.decode, "batch size": self.batch_size}
        for name, count in {**counts, "repeats": self.repeats, "threads": self.threads or 1}.items():
            if count < 1:
                raise ConfigError(f"The {name} is {count}.", "", "Choose 1 or more.")
        check_seed(self.seed)
        if self.batch_size * max(self.prompts) > _MAX_TOKENS:
            raise ConfigError(
                f"A batch of {self.batch_size} prompts of {max(self.prompts)} tokens is too large.",
                "",
                f"Choose {_MAX_TOKENS} tokens in a batch, or fewer.",
            )
        if self.threads is not None and self.threads > MAX_THREADS:
            raise ConfigError(f"Invalid number of threads: {self.threads}.", "", f"Choose {MAX_THREADS} or fewer.")

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def provider(self) -> str:
        """The execution provider of ONNX Runtime, as `deltamem run` names it."""
        return "cuda" if self.on_cuda else "cpu"

    @property
    def sides(self) -> list[tuple[str, str]]:
        """All pairs of runtime and model, in the order of the results."""
        return [(runtime, model) for runtime in self.runtimes for model in self.models]

    def ids(self, prompt: int, vocab_size: int) -> NDArray[np.int64]:
        """Return random tokens, int64 `[B, prompt]`, which are the same in every process."""
        random = np.random.default_rng((self.seed, prompt))
        return random.integers(vocab_size, size=(self.batch_size, prompt), dtype=np.int64)

    def check_length(self, limit: int | None, why: str) -> None:
        """Check that the longest prompt and its decoded tokens fit into `limit` tokens.

        Raises:
            ConfigError: they do not fit. The message includes `why`, the source of the limit.
        """
        longest = max(self.prompts)
        if limit and longest + self.decode > limit:
            raise ConfigError(
                f"A prompt of {longest} tokens and {self.decode} decoded tokens are too long.",
                why,
                f"Choose prompts of at most {limit - self.decode} tokens, or decode fewer."
                if limit > self.decode
                else "Decode fewer tokens.",
            )


def _check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        why = f"{unknown[0]!r} is unknown." if unknown else "A name is repeated." if names else "There are none."
        raise ConfigError(f"Invalid {option}: {','.join(names)!r}.", why, f"Choose from {','.join(known)}.")


def name_of(runtime: str, model: str) -> str:
    """Return the name of a model in a runtime, as shown in results, such as "pytorch memory"."""
    return f"{runtime} {model}"
