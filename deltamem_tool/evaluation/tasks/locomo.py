"""LoCoMo: questions about months of conversation between two people (arXiv 2402.17753).

The data are in the file `locomo10.json` (CC BY-NC 4.0). Scores are those of the benchmark's
`task_eval/evaluation.py`: F1 of stemmed words; for questions with several answers, its mean over them; and for a
question about something never said, whether the model declines to answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation.task import Item, require_data
from deltamem_tool.segments.messages import Message

GROUPS = {1: "multi-hop", 2: "temporal", 3: "open domain", 4: "single-hop", 5: "adversarial"}
UNSAID = "not mentioned"  # the expected answer to an adversarial question
_TURNED_DOWN = ("no information available", UNSAID)
_ASK = (
    "{question}\nAnswer in a few words, with those of the conversation where you can. "
    f'If it was never talked about, say "{UNSAID}".'
)
_DATED = " The conversations have dates: give a date or a time."
_ARTICLES = re.compile(r"\b(a|an|the|and)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class LoCoMo:
    """One item per question. All questions about one pair of people share a history, with one session per talk.

    The first person is the user, the second one the assistant, and both are named in their messages.

    Args:
        data: `locomo10.json`, or a file or a dataset in its format.
        config, split: configuration and split of a dataset; by default "train".
    """

    name = "locomo"
    metrics = ("f1",)
    max_new_tokens = 32

    def __init__(self, data: str | None = None, config: str | None = None, split: str | None = None) -> None:
        self._data = require_data(self.name, data, "locomo10.json", config=config, split=split)
        self._config, self._split = config, split

    def items(self) -> list[Item]:
        """Return one item per question."""
        from deltamem_tool.data.sources import read_rows

        talks = read_rows(self._data, "conversation", self._config, self._split)
        return [
            item for number, (where, talk) in enumerate(talks, 1) for item in self._question_items(talk, number, where)
        ]

    def _question_items(self, talk: Any, number: int, where: str) -> Iterator[Item]:
        try:
            history = _sessions(talk["conversation"])
            questions, name = talk["qa"], str(talk.get("sample_id", number))
        except KeyError as error:
            raise _format_error(where, f"It has no {error}.") from error
        except (TypeError, AttributeError) as error:
            raise _format_error(where, f"{error}.") from error
        if not history or not isinstance(questions, list) or not questions:
            raise _format_error(where, "It has no session, or no question.")
        for place, row in enumerate(questions, start=1):
            yield _item(row, f"{where} question {place}", f"{name}/{place}", name, history)

    def score(self, item: Item, answer: str) -> Mapping[str, float]:
        """Return the benchmark's score for the question's category."""
        if item.group == GROUPS[5]:
            return {"f1": float(any(words in answer.lower() for words in _TURNED_DOWN))}
        right = item.answers[0]
        if item.group == GROUPS[1]:  # several answers, each of which is compared with those given
            named = [part.strip() for part in answer.split(",")]
            wanted = [part.strip() for part in right.split(",")]
            return {"f1": sum(max(stemmed_f1(one, part) for one in named) for part in wanted) / len(wanted)}
        return {"f1": stemmed_f1(answer, right)}


def stemmed_f1(answer: str, right: str) -> float:
    """Return the harmonic mean of precision and recall of Porter stems, without case, punctuation and articles."""
    words, wanted = _stems(answer), _stems(right)
    common = sum((Counter(words) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _stems(text: str) -> list[str]:
    try:
        from nltk.stem import PorterStemmer
    except ImportError as error:
        raise ConfigError(
            "LoCoMo's F1 needs the package nltk.", f"{error}.", "pip install 'deltamem-tool[eval]'."
        ) from error
    stem = PorterStemmer().stem
    plain = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return [stem(word) for word in plain.split()]


def _sessions(conversation: Mapping[str, Any]) -> list[list[Message]]:
    """Return all sessions that have text. Each message starts with the date, because it may be the only one in view."""
    first = conversation["speaker_a"]
    numbers = sorted(int(match[1]) for key in conversation if (match := re.fullmatch(r"session_(\d+)", key)))
    sessions = []
    for number in numbers:
        turns = conversation[f"session_{number}"]
        if not turns:  # in a table, every conversation has columns for the sessions of all
            continue
        date = conversation[f"session_{number}_date_time"]
        messages: list[Message] = []
        for turn in turns:
            role = "user" if turn["speaker"] == first else "assistant"
            if not messages and role == "assistant":  # templates require that the user begins
                messages.append({"role": "user", "content": f"({date})"})
            if not isinstance(turn["text"], str):
                raise TypeError(f"A turn of session {number} has no text")
            line = f"{turn['speaker']}: {turn['text']}"
            if turn.get("blip_caption"):
                line += f" (shows a picture: {turn['blip_caption']})"
            if messages and messages[-1]["role"] == role:  # they also require alternating roles
                messages[-1] = {"role": role, "content": f"{messages[-1]['content']}\n{line}"}
            else:
                messages.append({"role": role, "content": f"({date}) {line}"})
        sessions.append(messages)
    return sessions


def _item(row: Any, where: str, id: str, history_id: str, history: list[list[Message]]) -> Item:
    try:
        category, question, answer = row["category"], row["question"], row.get("answer")
    except (KeyError, TypeError) as error:
        raise _format_error(where, f"It lacks {error}.") from error
    if type(category) is not int or category not in GROUPS:
        raise _format_error(where, f"Its category is {category!r}, not a number from 1 to 5.")
    if not isinstance(question, str) or not question.strip():
        raise _format_error(where, "It has no question.")
    group = GROUPS[category]
    answer = UNSAID if group == GROUPS[5] else str(answer) if type(answer) in (str, int, float) else ""
    if group == GROUPS[3]:
        answer = answer.split(";")[0].strip()  # the rest is an explanation
    if not answer.strip():
        raise _format_error(where, "It has no answer.")
    content = _ASK.format(question=question) + (_DATED if group == GROUPS[2] else "")
    return Item(id, history_id, history, [{"role": "user", "content": content}], [answer], group, where, question)


def _format_error(where: str, why: str) -> DataError:
    return DataError(f"{where} is not a LoCoMo conversation.", why, "Use the locomo10.json that its authors publish.")
