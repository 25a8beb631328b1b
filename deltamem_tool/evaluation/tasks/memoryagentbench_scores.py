"""MemoryAgentBench's scores: `post_process` of its `utils/eval_other_utils.py` (MIT, HUST-AI-HYZ/MemoryAgentBench).

There is one difference. The script takes the first line of the generated text, which is empty if the text begins with a
line feed. Here, answers are stripped of surrounding whitespace first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation.scoring.metrics import best_score, contains, exact_match, rouge, token_f1

CUTOFFS = (1, 5, 10)  # numbers of recommendations for which recall is computed
_ANSWER = "Answer:"
_PARENTHESES = re.compile(r"\([^()]*\)")
_NUMBERING = re.compile(r"^(?:\d+[\.\)、]?\s*[\-\—\–]?\s*)?")


def first_answer(text: str) -> str:
    """Return the text after "Answer:" in its line, or else the first line, like the script's `parse_output`."""
    match = re.search(f"{_ANSWER}(.*)", text, re.IGNORECASE) or re.match("(.*)", text)
    assert match is not None  # the second pattern fits any text
    line = match[1].strip()
    return line[len(_ANSWER) :].strip() if line.lower().startswith(_ANSWER.lower()) else line


def text_scores(answer: str, right: Sequence[str]) -> dict[str, float]:
    """Return the best score over the correct answers, by metric, like the script's `calculate_metrics`."""
    scores = {
        "exact_match": best_score(exact_match, answer, right),
        "f1": best_score(token_f1, answer, right),
        "substring_exact_match": best_score(contains, answer, right),
    }
    for kind in ("rougeL", "rougeLsum"):
        rouges = [rouge(answer, one, kind) for one in right]
        scores[f"{kind}_f1"] = max(one.f1 for one in rouges)
        scores[f"{kind}_recall"] = max(one.recall for one in rouges)
    return scores


def answer_scores(source: str, answer: str, right: Sequence[str]) -> dict[str, float]:
    """Return the script's scores for a text answer, which depend on the source of its question.

    For labels (icl) and events (eventqa), only the parsed answer counts. For other sources, it is the better of the
    parsed and the whole answer.
    """
    parsed = text_scores(first_answer(answer), right)
    if "icl" in source:
        return parsed
    if "eventqa" in source:
        return {**parsed, "eventqa_recall": float(all(one.lower() in answer.lower() for one in right))}
    whole = text_scores(answer, right)
    return {name: max(score, parsed[name]) for name, score in whole.items()}


class Movies:
    """The titles of `entity2id.json`, with which recommendations are matched, like `_process_recsys_dataset` does.

    The script breaks ties between equally similar titles by the order of a Python set, which differs in every run.
    Here, the first title in the file wins.

    Args:
        numbers: number of each entity.

    Raises:
        ConfigError: rapidfuzz is not installed.
    """

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self._titles = {number: _title(entity) for entity, number in numbers.items()}
        self._known = list(dict.fromkeys(self._titles.values()))
        self._lower = [title.lower() for title in self._known]
        try:
            from rapidfuzz import process
            from rapidfuzz.distance import Levenshtein
        except ImportError as error:
            raise ConfigError(
                "Recommendations need the package rapidfuzz.", f"{error}.", "pip install 'deltamem-tool[eval]'."
            ) from error
        self._nearest, self._distance = process.extractOne, Levenshtein.distance

    def __contains__(self, number: str) -> bool:
        return number.strip().isdigit() and int(number) in self._titles

    def recalls(self, answer: str, right: Sequence[str]) -> dict[str, float]:
        """Return the share of correct titles among the first 1, 5 and 10 recommendations.

        Args:
            answer: the list of recommendations.
            right: numbers of the correct titles.
        """
        titles = [self._nearest_title(line) for line in _recommendations(answer)[: max(CUTOFFS)]]
        wanted = [self._titles[int(number)] for number in right]
        return {
            f"recsys_recall@{cutoff}": sum(title in titles[:cutoff] for title in wanted) / len(wanted)
            for cutoff in CUTOFFS
        }

    def _nearest_title(self, name: str) -> str:
        _, _, place = self._nearest(name.lower(), self._lower, scorer=self._distance)
        return self._known[place]


def _title(entity: str) -> str:
    """Return the title in a name like `<http://dbpedia.org/resource/Heat_(1995_film)>`."""
    name = re.sub("[_>-]", " ", entity.split("/")[-1])
    return " ".join(_PARENTHESES.sub("", name).split())


def _recommendations(answer: str) -> list[str]:
    """Return the lines of a numbered list or the parts between commas, like `extract_recommendation_list`."""
    before, numbered, listed = answer.partition("1.")
    lines = (listed if numbered else before.replace(",", "\n")).split("\n")
    return [" ".join(_NUMBERING.sub("", _PARENTHESES.sub("", line.strip())).split()) for line in lines]
