"""Scores of an answer against the correct ones, computed as in the published scripts of the benchmarks."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from deltamem_tool.errors import ConfigError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DECLINES = re.compile(
    r"(not|n't|never) (yet )?(been )?(told|know|say|said|mention|specif|provid|shared|given|sure|aware|available)"
    r"|(not|n't) have (that|this|any|enough)"
    r"|no (information|record|idea|mention)|unknown|unable to"
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower text, and remove punctuation, articles and extra space, like `normalize_answer` of SQuAD and HotpotQA."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(answer: str, right: str) -> float:
    """Return whether the texts are identical."""
    return float(answer == right)


def exact_match(answer: str, right: str) -> float:
    """Return whether the texts are identical after normalisation."""
    return float(normalise(answer) == normalise(right))


def token_f1(answer: str, right: str) -> float:
    """Return the harmonic mean of precision and recall of normalised words, like HotpotQA's `f1_score`.

    For the answers yes, no and noanswer, it is 1 for an exact match and 0 otherwise.
    """
    words, wanted = normalise(answer), normalise(right)
    if words != wanted and {words, wanted} & {"yes", "no", "noanswer"}:
        return 0.0
    common = sum((Counter(words.split()) & Counter(wanted.split())).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(words.split()), common / len(wanted.split())
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True)
class Rouge:
    """Recall and F1 of one kind of ROUGE."""

    recall: float
    f1: float


def rouge(answer: str, right: str, kind: str = "rougeL") -> Rouge:
    """Return ROUGE over Porter stems, computed by `rouge-score`.

    Args:
        answer: answer of the model.
        right: correct answer.
        kind: "rouge1", "rouge2", "rougeL" or "rougeLsum".

    Raises:
        ConfigError: `rouge-score` is not installed.
    """
    score = _rouge_scorer(kind).score(target=right, prediction=answer)[kind]
    return Rouge(score.recall, score.fmeasure)


@lru_cache
def _rouge_scorer(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            "ROUGE needs the package rouge-score.", f"{error}.", "pip install 'deltamem-tool[eval]'."
        ) from error
    return RougeScorer([kind], use_stemmer=True)


def contains(answer: str, right: str) -> float:
    """Return whether the correct answer occurs in the answer after normalisation.

    This is MemoryAgentBench's `substring_exact_match_score`.
    """
    return float(normalise(right) in normalise(answer))


def mentions(answer: str, value: str) -> bool:
    """Return whether a value occurs in the answer as whole words, after normalisation."""
    return f" {normalise(value)} " in f" {normalise(answer)} "


def mentions_only(answer: str, value: str, others: Sequence[str]) -> float:
    """Return whether a value occurs in the answer and none of the others does."""
    return float(mentions(answer, value) and not any(mentions(answer, other) for other in others))


def declines(answer: str) -> bool:
    """Return whether the answer says that something is unknown or was not told."""
    return _DECLINES.search(answer.lower().replace("\u2019", "'")) is not None


def best_score(metric: Callable[[str, str], float], answer: str, answers: Sequence[str]) -> float:
    """Return the highest score over several correct answers."""
    return max(metric(answer, right) for right in answers)
