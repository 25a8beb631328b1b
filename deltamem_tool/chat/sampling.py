"""Choose the next token from logits: greedily, or by sampling as transformers does. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.errors import ConfigError, DeltaMemError
from deltamem_tool.segments.messages import is_unicode

MAX_NEW_TOKENS = 256  # of an answer, unless told otherwise


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen, and when it ends.

    The options are applied in the order of transformers' `generate`: repetition penalty, temperature, top-k, top-p,
    min-p.

    Args:
        max_new_tokens: maximum length of an answer, in tokens.
        temperature: 0 picks the most likely token; higher values make answers more varied.
        top_k: sample among the `top_k` most likely tokens; 0 means all.
        top_p: sample among the most likely tokens whose probabilities add up to `top_p`.
        min_p: sample among tokens with at least this fraction of the most likely token's probability.
        repetition_penalty: positive logits of tokens in the context are divided by it, and negative ones multiplied;
            1 changes nothing.
        seed: random seed for sampling; None draws a new one.
        stop: stop strings; the answer ends before the first one.

    Raises:
        ConfigError: an option is out of range.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for is_valid, why in (
            (self.max_new_tokens >= 1, f"max_new_tokens must be 1 or more, not {self.max_new_tokens}"),
            (0 <= self.temperature < np.inf, f"temperature must be 0 or more, not {self.temperature}"),
            (self.top_k >= 0, f"top_k must be 0 (off) or more, not {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}"),
            (0 <= self.min_p <= 1, f"min_p must be 0 to 1, not {self.min_p}"),
            (
                0 < self.repetition_penalty < np.inf,
                f"repetition_penalty must be above 0, not {self.repetition_penalty}",
            ),
            (self.seed is None or self.seed >= 0, f"seed must be 0 or more, not {self.seed}"),
            (
                isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop),
                "stop must be a tuple of texts, none of them empty",
            ),
            (all(map(is_unicode, self.stop)), "stop must be Unicode text, without half of a surrogate pair"),
        ):
            if not is_valid:
                raise ConfigError("Invalid sampling options.", f"{why}.", "Correct the option and try again.")


def token_mask(ids: Collection[int]) -> NDArray[Any]:
    """Return a bool mask of the token ids in `ids`, as long as the largest of them requires."""
    mask = np.zeros(1 + max(ids), bool)
    mask[list(ids)] = True
    return mask


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: the options.
        context: tokens before the answer, for the repetition penalty.
        valid: `token_mask` of the tokens that may be chosen. Models often have more logits than tokens.

    Attributes:
        is_greedy: whether it picks the most likely token, whatever the context is.
    """

    def __init__(self, sampling: Sampling, context: NDArray[Any], valid: NDArray[Any]) -> None:
        self.is_greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = np.zeros(max(len(valid), 1 + int(context.max(initial=0))), bool)
        self._seen[context] = True
        self._tokens = valid

    def pick(self, logits: NDArray[Any]) -> int:
        """Return the next token, from logits `[V]`.

        Raises:
            DeltaMemError: the logit of a valid token is NaN or infinity, or those of all are minus infinity.
        """
        self._seen, self._tokens = (_fit_length(mask, len(logits)) for mask in (self._seen, self._tokens))
        allowed = np.where(self._tokens, logits, -np.inf)
        if not np.isfinite(allowed.max()):
            raise not_finite_error("The model's logits")
        scores = apply_repetition_penalty(allowed, self._seen, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            token = int(self._random.choice(len(logits), p=probabilities(scores, self._sampling)))
        self._seen[token] = True
        return token


class GreedySampler:
    """Chooses one token for each of many answers, as a `Sampler` with `is_greedy` does for a single one.

    Args:
        valid: as in `Sampler`.
    """

    def __init__(self, valid: NDArray[Any]) -> None:
        self._tokens = valid

    def pick(self, logits: NDArray[Any]) -> list[int | None]:
        """Return the next tokens, from logits `[B, V]`; None for a row in which `Sampler.pick` would raise."""
        self._tokens = _fit_length(self._tokens, logits.shape[1])
        tokens = logits.argmax(axis=1)
        for row in np.flatnonzero(~self._tokens[tokens]):
            tokens[row] = np.where(self._tokens, logits[row], -np.inf).argmax()
        valid = self._tokens[tokens] & np.isfinite(logits[np.arange(len(tokens)), tokens])
        return [token if of_row else None for token, of_row in zip(tokens.tolist(), valid.tolist(), strict=True)]


def not_finite_error(what: str) -> DeltaMemError:
    """Return the error for `what` a model has computed that contains NaN or infinity."""
    return DeltaMemError(
        f"{what} contain NaN or infinity.",
        "The weights are damaged or overflow in half precision, or the memory belongs to another model.",
        "Try another dtype or an earlier memory, or train with a lower learning rate.",
    )


def _fit_length(mask: NDArray[Any], length: int) -> NDArray[Any]:
    return mask if len(mask) == length else np.pad(mask[:length], (0, max(0, length - len(mask))))


def apply_repetition_penalty(logits: NDArray[Any], seen: NDArray[Any], penalty: float) -> NDArray[Any]:
    """Return logits `[V]` after the penalty for tokens in the mask `seen`: float64, or unchanged if it is 1."""
    if penalty == 1:
        return logits
    logits = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # of a penalty near 0 or without end
        changed = np.where(logits < 0, logits * penalty, logits / penalty)
    return np.where(seen, np.minimum(changed, np.finfo(np.float64).max), logits)


def probabilities(logits: NDArray[Any], sampling: Sampling) -> NDArray[Any]:
    """Return the probabilities to draw from at a temperature above 0: float64 `[V]`, zero for excluded tokens.

    Args:
        logits: `[V]`, after the repetition penalty.
        sampling: options that exclude tokens, and the temperature.
    """
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # of a temperature near 0, at which all but the likeliest are left out
        scores = (scores - scores.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        least = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores = np.where(scores < least, -np.inf, scores)
    if sampling.top_p < 1:
        order = np.argsort(scores, kind="stable")  # ascending, as transformers does: the tail is what is cut off
        order = order[:-1][np.cumsum(_softmax(scores)[order])[:-1] <= 1 - sampling.top_p]
        scores[order] = -np.inf
    if sampling.min_p > 0:
        chances = _softmax(scores)
        scores = np.where(chances < sampling.min_p * chances.max(), -np.inf, scores)
    return _softmax(scores)


def _softmax(scores: NDArray[Any]) -> NDArray[Any]:
    chances: NDArray[Any] = np.exp(scores - scores.max())
    return np.asarray(chances / chances.sum())
