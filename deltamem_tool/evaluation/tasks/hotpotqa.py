"""HotpotQA in the distractor setting: a question whose answer needs two of ten paragraphs (arXiv 1809.09600).

Scores are those of the benchmark's `hotpot_evaluate_v1.py`: exact match and F1 of normalised words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.scoring.metrics import exact_match, token_f1
from deltamem_tool.evaluation.task import Item, require_data
from deltamem_tool.segments.messages import Message

_ASK = "{question}\nAnswer with the name, the few words, or yes or no alone."
_SEEN = "Read."  # templates require alternating roles


class HotpotQA:
    """One item per question. Its history is one session, with one message per paragraph.

    Args:
        data: `hotpot_dev_distractor_v1.json`, or the same rows as JSON lines or parquet, or `hotpotqa/hotpot_qa`. Both
            forms of `context` are supported, the authors' pairs and the Hub's two lists.
        config, split: configuration and split of a dataset; by default "distractor" and "validation".
    """

    name = "hotpotqa"
    metrics = ("f1", "em")
    max_new_tokens = 32

    def __init__(self, data: str | None = None, config: str | None = None, split: str | None = None) -> None:
        self._data = require_data(self.name, data, "hotpot_dev_distractor_v1.json", config=config, split=split)
        self._config, self._split = config, split

    def items(self) -> list[Item]:
        """Return one item per question."""
        from deltamem_tool.data.sources import read_rows

        rows = read_rows(self._data, "question", self._config, self._split, ("distractor", ("validation",)))
        return [_item(row, where) for where, row in rows]

    def score(self, item: Item, answer: str) -> Mapping[str, float]:
        """Return F1 and exact match."""
        return {"f1": token_f1(answer, item.answers[0]), "em": exact_match(answer, item.answers[0])}


def _item(row: Any, where: str) -> Item:
    try:
        name = str(row["_id"] if "_id" in row else row["id"])
        paragraphs = _paragraphs(row["context"])
        question, answer, group = row["question"], row["answer"], row["type"]
    except KeyError as error:
        raise _format_error(where, f"It has no {error}.") from error
    except (TypeError, ValueError) as error:
        raise _format_error(where, f"{error}.") from error
    for field, text in (("question", question), ("answer", answer), ("type", group)):
        if not isinstance(text, str) or not text.strip():
            raise _format_error(where, f"It has no {field}.")
    if not paragraphs:
        raise _format_error(where, "It has no paragraph.")
    messages: list[Message] = []
    for title, text in paragraphs:
        messages += [{"role": "user", "content": f"{title}\n{text}"}, {"role": "assistant", "content": _SEEN}]
    request = [{"role": "user", "content": _ASK.format(question=question)}]
    return Item(name, name, [messages], request, [answer], group, where, question)


def _paragraphs(context: Any) -> list[tuple[str, str]]:
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
    paragraphs = [(title, "".join(sentences).strip()) for title, sentences in pairs]
    if not all(isinstance(title, str) for title, _ in paragraphs):
        raise ValueError("A paragraph has no title")
    return paragraphs


def _format_error(where: str, why: str) -> DataError:
    return DataError(f"{where} is not a HotpotQA question.", why, "Use the distractor file that its authors publish.")
