"""HotpotQA, distractor setting: a question whose answer needs two of ten paragraphs (arXiv 1809.09600).

Scores are those of the benchmark's `hotpot_evaluate_v1.py`: exact match and F1 of normalised words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltamem_tool.chat_template import Message
from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation.metrics import exact_match, token_f1
from deltamem_tool.evaluation.task import Item

_ASK = "{question}\nAnswer with the name, the few words, or yes or no alone."
_SEEN = "Read."  # templates want roles to take turns


class HotpotQA:
    """One item a question; its history is one session, a message a paragraph.

    Args:
        data: `hotpot_dev_distractor_v1.json`, or the same rows as JSON lines or parquet; both forms of `context` are
            read, the authors' pairs and the Hub's two lists.
    """

    name = "hotpotqa"
    metrics = ("f1", "em")
    max_new_tokens = 32

    def __init__(self, data: str | None = None) -> None:
        if data is None:
            raise ConfigError("The task hotpotqa needs its file.", "", "Pass --data hotpot_dev_distractor_v1.json.")
        self._file = Path(data)

    def items(self) -> list[Item]:
        from deltamem_tool.data.sources import read_json_list

        rows = read_json_list(self._file)
        return [_item(row, f"{self._file} question {number}") for number, row in enumerate(rows, start=1)]

    def score(self, item: Item, answer: str) -> Mapping[str, float]:
        return {"f1": token_f1(answer, item.answers[0]), "em": exact_match(answer, item.answers[0])}


def _item(row: Any, where: str) -> Item:
    try:
        name = str(row["_id"] if "_id" in row else row["id"])
        paragraphs = _paragraphs(row["context"])
        question, answer, group = row["question"], row["answer"], row["type"]
        if not all(isinstance(text, str) and text for text in (question, answer, group)) or not paragraphs:
            raise ValueError("an empty question, answer, type or context")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is none of HotpotQA.", f"{error}.", "Use the distractor file.") from error
    told: list[Message] = []
    for title, text in paragraphs:
        told += [{"role": "user", "content": f"{title}\n{text}"}, {"role": "assistant", "content": _SEEN}]
    asked = [{"role": "user", "content": _ASK.format(question=question)}]
    return Item(name, name, [told], asked, [answer], group, where, question)


def _paragraphs(context: Any) -> list[tuple[str, str]]:
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
    return [(title, "".join(sentences).strip()) for title, sentences in pairs]
