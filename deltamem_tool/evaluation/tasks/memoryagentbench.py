"""MemoryAgentBench: long texts that are read chunk by chunk, then asked about (arXiv 2507.05257, MIT).

It covers four competences, each with several sources. The source decides what is scored, how a text is split and how
long an answer may be, as in the paper and the benchmark's repository (HUST-AI-HYZ/MemoryAgentBench).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation.chunks import Count, sentence_chunks, token_counter
from deltamem_tool.evaluation.task import Item, require_data
from deltamem_tool.evaluation.tasks.memoryagentbench_scores import Movies, answer_scores
from deltamem_tool.io.names import expand_user
from deltamem_tool.segments.messages import Message

SCORE = "score"  # the source's own metric
WITHOUT_JUDGE = "rougeL_f1"  # replaces the judge of the benchmark with the option `without_judge`
RETRIEVAL, LEARNING, UNDERSTANDING, CONFLICT = (
    "accurate retrieval",
    "test-time learning",
    "long-range understanding",
    "conflict resolution",
)
SPLITS = ("Accurate_Retrieval", "Test_Time_Learning", "Long_Range_Understanding", "Conflict_Resolution")
_SHORT, _LONG = 512, 4096  # tokens per chunk: for texts composed of short ones, and for the others (section 4.1)


@dataclass(frozen=True)
class Family:
    """Sources that are split, asked and scored in the same way.

    `metric` is a name of `answer_scores` or of `Movies.recalls`; None if GPT-4o judges. `contents` describes the
    content of a chunk.
    """

    competence: str
    metric: str | None
    chunk: int
    new_tokens: int
    contents: str
    ask: str


FAMILIES = {  # by the beginning of the source's name
    "ruler_qa": Family(
        RETRIEVAL,
        "substring_exact_match",
        _SHORT,
        50,
        "documents",
        "Answer from the documents that you have read, with the answer alone.\nQuestion: {question}",
    ),
    "longmemeval": Family(
        RETRIEVAL,
        None,
        _SHORT,
        100,
        "our earlier conversations",
        "Answer from our earlier conversations, in as few words as you can.{today}\nQuestion: {question}",
    ),
    "eventqa": Family(
        RETRIEVAL,
        "substring_exact_match",
        _LONG,
        40,
        "a part of a novel",
        "{question}\nWhich of these events comes next in the novel? Repeat that event, and nothing else.",
    ),
    "icl": Family(
        LEARNING,
        "exact_match",
        _LONG,
        20,
        "examples with their labels",
        "{question}\nWhich label do the examples give to this? Answer with its number alone.",
    ),
    "recsys": Family(
        LEARNING,
        "recsys_recall@5",
        _LONG,
        300,
        "conversations with a recommender of movies",
        "You recommend movies. This is a new conversation:\n{question}\n"
        "Recommend 20 movies, one a line, numbered from 1., and say nothing else.",
    ),
    "infbench_sum": Family(
        UNDERSTANDING,
        None,
        _LONG,
        1200,
        "a part of a novel",
        "{question}\nSummarise the novel in 1000 to 1200 words: plot and characters, no comment.",
    ),
    "detective_qa": Family(
        UNDERSTANDING,
        "exact_match",
        _LONG,
        500,
        "a part of a novel",
        "Answer from the whole novel, in the form that the question wants.\n{question}",
    ),
    "factconsolidation": Family(
        CONFLICT,
        "substring_exact_match",
        _SHORT,
        10,
        "numbered facts",
        "Of facts that contradict each other, the one with the larger number holds. Answer from these facts, not from "
        "what you know of the world, and with the answer alone.\nQuestion: {question}",
    ),
}
_TELL = "These are {contents}. Remember them; I will ask about them later.\n\n{chunk}"
_TOLD = "I have read them and will remember them."


class MemoryAgentBench:
    """One item per question. Questions about the same text share its history, even from different rows.

    A session is a chunk, because the benchmark passes chunks one by one, each in a separate dialogue. A whole text (up
    to 1.4 million tokens) fits into the positions of few models.

    Args:
        data: `ai-hyz/MemoryAgentBench`, or rows of it in a file.
        config, split: configuration and split of a dataset; by default all four splits.
        sources: use only sources whose names start with one of these.
        chunk: tokens per chunk; by default that of the source.
        tokenizer: folder or Hub id of the tokenizer that counts tokens; by default that of gpt-4o-mini, as in the
            benchmark.
        movies: the benchmark's `entity2id.json`, for `recsys_redial`.
        without_judge: score sources for which the benchmark uses GPT-4o as judge (`longmemeval`, `infbench_sum`) with
            the F1 of ROUGE-L, which its script also computes; otherwise they are rejected.
    """

    name = "memoryagentbench"
    metrics = (SCORE,)
    max_new_tokens = max(family.new_tokens for family in FAMILIES.values())

    def __init__(
        self,
        data: str | None = None,
        config: str | None = None,
        split: str | None = None,
        sources: Sequence[str] | str | None = None,
        chunk: int | None = None,
        tokenizer: str | None = None,
        movies: str | None = None,
        without_judge: bool = False,
    ) -> None:
        texts = {"config": config, "split": split, "tokenizer": tokenizer, "movies": movies}
        self._data = require_data(self.name, data, "ai-hyz/MemoryAgentBench", **texts)
        if chunk is not None and (type(chunk) is not int or chunk < 1):
            raise ConfigError(
                f"The chunk size {chunk!r} is not valid.", "A chunk has one token or more.", "Use 1 or more."
            )
        named = [sources] if isinstance(sources, str) else sources or []
        if not isinstance(named, Sequence) or not all(isinstance(name, str) for name in named):
            raise ConfigError(
                "The sources must be a list of names.", f"It is {sources!r}.", "Write [eventqa,ruler_qa]."
            )
        self._config, self._split, self._sources = config, split, tuple(named)
        self._chunk, self._tokenizer, self._without_judge = chunk, tokenizer, without_judge
        self._movies_file = movies
        self._movies: Movies | None = None

    def items(self) -> list[Item]:
        """Return one item per question."""
        from deltamem_tool.data.sources import read_rows

        rows = read_rows(self._data, "row", self._config, self._split, (None, SPLITS))
        chosen = self._select_rows(
            [_Row.parse(row, where, number) for number, (where, row) in enumerate(rows, start=1)]
        )
        histories = _Histories(token_counter(self._tokenizer), self._chunk)
        items = [item for row in chosen for item in row.items(*histories.for_row(row), self._label(row))]
        self._movies = _read_movies(self._movies_file, items)
        return items

    def score(self, item: Item, answer: str) -> Mapping[str, float]:
        """Return the source's own metric as `score`, and all other scores of the benchmark's script."""
        source = item.id.partition("/")[0]
        metric = _family(source, item.where).metric or WITHOUT_JUDGE
        if source.startswith("recsys"):
            assert self._movies is not None  # items() has read them
            scores = self._movies.recalls(answer, item.answers)
        else:
            scores = answer_scores(source, answer, item.answers)
        return {SCORE: scores[metric], **scores}

    def _select_rows(self, rows: list[_Row]) -> list[_Row]:
        chosen = [row for row in rows if not self._sources or row.source.startswith(self._sources)]
        if not chosen:
            sources = ", ".join(dict.fromkeys(row.source for row in rows))
            raise DataError(
                f"{self._data} has no source {' or '.join(map(str, self._sources))}.",
                f"Its sources are {sources}.",
                "Use these names, or the beginning of one.",
            )
        for row in chosen:
            if row.family.metric is None and not self._without_judge:
                raise ConfigError(
                    f"{row.where}: answers of the source {row.source} are judged by GPT-4o in the benchmark.",
                    "This task has no judge.",
                    "Choose other sources (--set sources=[factconsolidation,ruler_qa]), or use ROUGE-L's F1 instead "
                    "(--set without_judge=true).",
                )
        return chosen

    def _label(self, row: _Row) -> str:
        unjudged = " (ROUGE-L F1, no judge)" if row.family.metric is None else ""
        return f"{row.family.competence}, {row.source}{unjudged}"


@dataclass(frozen=True)
class _Row:
    """A text and the questions about it."""

    source: str
    family: Family
    context: str
    questions: list[str]
    answers: list[list[str]]
    dates: list[str]  # of the questions, if the source has them
    where: str
    number: int  # among all rows, for the names of its questions

    @classmethod
    def parse(cls, row: Any, where: str, number: int) -> _Row:
        try:
            metadata = row.get("metadata") or {}
            source = str(metadata.get("source"))
            context, questions, answers = row["context"], row["questions"], row["answers"]
            dates = metadata.get("question_dates")
        except (AttributeError, KeyError, TypeError) as error:
            raise _row_error(where, f"It has no {error}." if isinstance(error, KeyError) else f"{error}.") from error
        if not isinstance(context, str) or not context.strip():
            raise _row_error(where, "Its context is not a text.")
        if not isinstance(questions, list) or not questions or not isinstance(answers, list):
            raise _row_error(where, "Its questions and answers are not lists.")
        family = _family(source, where)
        if len(questions) == 1:
            answers = [_flat(answers)]  # as in the benchmark's `_create_query_answer_pairs`
        if len(answers) != len(questions):
            raise _row_error(where, f"It has {len(questions)} questions and {len(answers)} answers.")
        answers = [[one] if isinstance(one, str) else one for one in answers]
        for place, (question, right) in enumerate(zip(questions, answers, strict=True), start=1):
            if not _is_text(question):
                raise _row_error(f"{where} question {place}", "The question is not a text.")
            if not isinstance(right, list) or not right or not all(_is_text(one) for one in right):
                raise _row_error(f"{where} question {place}", "It has no answer.")
        dates = dates if isinstance(dates, list) else []  # most sources have none
        return cls(source, family, context, questions, answers, dates, where, number)

    def items(self, history_id: str, history: list[list[Message]], group: str) -> Iterator[Item]:
        for number, (question, right) in enumerate(zip(self.questions, self.answers, strict=True), start=1):
            today = f" Today is {self.dates[number - 1]}." if number <= len(self.dates) else ""
            # Without `format`, because a question may contain braces.
            asked = self.family.ask.replace("{today}", today).replace("{question}", question)
            yield Item(
                f"{self.source}/{self.number}/{number}",
                history_id,
                history,
                [{"role": "user", "content": asked}],
                right,
                group,
                f"{self.where} question {number}",
                question,
                self.family.new_tokens,
            )


class _Histories:
    """The chunks of each text, stored once.

    Single-hop and multi-hop questions are about the same texts. As two histories, each would be the donor of the other,
    and the donor would not be a control.
    """

    def __init__(self, count: Count, chunk: int | None) -> None:
        self._count, self._chunk = count, chunk
        self._known: dict[tuple[str, Family], tuple[str, list[list[Message]]]] = {}

    def for_row(self, row: _Row) -> tuple[str, list[list[Message]]]:
        """Return the name and the sessions of a row's history."""
        key = (row.context, row.family)
        if key not in self._known:
            chunks = sentence_chunks(row.context, self._chunk or row.family.chunk, self._count)
            sessions: list[list[Message]] = [
                [
                    {"role": "user", "content": _TELL.format(contents=row.family.contents, chunk=chunk)},
                    {"role": "assistant", "content": _TOLD},
                ]
                for chunk in chunks
            ]
            self._known[key] = (f"{row.source}, text {len(self._known) + 1}", sessions)
        return self._known[key]


def _family(source: str, where: str) -> Family:
    for beginning, family in FAMILIES.items():
        if source.startswith(beginning):
            return family
    raise _row_error(where, f"Its metadata name the source {source!r}; known are {', '.join(FAMILIES)}.")


def _read_movies(file: str | None, items: Sequence[Item]) -> Movies | None:
    wanted = [item for item in items if item.id.startswith("recsys")]
    if not wanted:
        return None
    if file is None:
        raise ConfigError(
            f"{wanted[0].where} asks for recommendations, which are matched to the titles in entity2id.json.",
            "That file is not beside the rows.",
            "Fetch it (hf download ai-hyz/MemoryAgentBench entity2id.json --repo-type dataset) and pass "
            "--set movies=entity2id.json, or leave recsys out of the sources.",
        )
    try:
        numbers = json.loads(expand_user(file).read_bytes())
        if not isinstance(numbers, dict) or not all(type(number) is int for number in numbers.values()):
            raise ValueError("It is not a mapping of names to numbers")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not an entity2id.json.", f"{error}.", "Use the benchmark's file.") from error
    movies = Movies(numbers)
    for item in wanted:
        unknown = [number for number in item.answers if number not in movies]
        if unknown:
            raise DataError(
                f"{item.where}: its answer {unknown[0]!r} is not a movie of {file}.",
                f"That file lists {len(numbers)} names.",
                "Use files of the same version.",
            )
    return movies


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _flat(answers: list[Any]) -> list[Any]:
    return [one for each in answers for one in (each if isinstance(each, list) else [each])]


def _row_error(where: str, why: str) -> DataError:
    return DataError(f"{where} is not a MemoryAgentBench row.", why, "Use ai-hyz/MemoryAgentBench as published.")
