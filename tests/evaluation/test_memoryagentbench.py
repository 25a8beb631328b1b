"""MemoryAgentBench: chunked, asked and scored as in its repository."""

from __future__ import annotations

import sys

import datasets
import nltk
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation.published import FACTS, SPLITS, TITLES, row, write
from helpers.tiny import randomise, tiny_model

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool.errors import ConfigError, DataError, HubError
from deltamem_tool.evaluation.chunks import sentence_chunks, token_counter
from deltamem_tool.evaluation.conditions import EvalProtocol
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.scoring.metrics import rouge
from deltamem_tool.evaluation.task import find_task
from deltamem_tool.evaluation.tasks.memoryagentbench_scores import Movies, first_answer

UNJUDGED = ["ruler", "eventqa", "icl", "detective", "factconsolidation"]


def words(texts):
    return [len(text.split()) for text in texts]


@pytest.fixture
def ask(tmp_path, checkpoint, punkt):
    """The task on rows, counting the tiny tokenizer's tokens."""

    def made(rows, **options):
        data = write(tmp_path / "rows.json", rows)
        return find_task("memoryagentbench", {"data": data, "tokenizer": str(checkpoint), **options})

    return made


def test_a_text_is_split_at_sentences(punkt):
    text = "Dr. Ann ran. She won!\nDid Ben? A sentence of more words than fit. No."
    assert sentence_chunks(text, 5, words) == [
        "Dr. Ann ran. She won!",
        "Did Ben?",
        "A sentence of more words than fit.",
        "No.",
    ]
    assert sentence_chunks(text, 100, words) == [text.replace("\n", " ")]
    assert sentence_chunks("A sentence of more words. No.", 1, words) == ["A sentence of more words.", "No."]


def test_missing_requirements_of_chunking_are_named(checkpoint, tmp_path, monkeypatch, punkt):
    count = token_counter(str(checkpoint))
    assert count(["My dog", ""]) == [len(token_counter(str(checkpoint))(["My dog"])) + 1, 0] and count([]) == []
    with pytest.raises(HubError, match="no tokenizer folder"):
        token_counter(str(tmp_path / "nowhere"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # no server listens, as without a network
    with pytest.raises(ConfigError, match=r"o200k_base.* cannot be fetched") as refused:
        token_counter()
    assert "--set tokenizer=" in refused.value.next
    monkeypatch.setattr(nltk.data, "path", [])
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    with pytest.raises(ConfigError, match="punkt_tab") as refused:
        sentence_chunks("One. Two.", 5, words)
    assert "nltk.downloader punkt_tab" in refused.value.next


def test_rows_become_questions(ask):
    task = ask(SPLITS["Conflict_Resolution"] + SPLITS["Accurate_Retrieval"][:2], chunk=40)
    items = task.items()
    assert [item.id for item in items][:3] == [
        "factconsolidation_mh_6k/1/1",
        "factconsolidation_mh_6k/1/2",
        "factconsolidation_sh_6k/2/1",
    ]
    assert [item.group for item in items[1:3]] == [
        "conflict resolution, factconsolidation_mh_6k",
        "conflict resolution, factconsolidation_sh_6k",
    ]
    assert items[0].where.endswith("rows.json row 1 question 1") and items[0].query == "Who lives with {Ben}?"
    assert (
        "Who lives with {Ben}?" in items[0].question[0]["content"]
        and "larger number" in items[0].question[0]["content"]
    )
    chunks = [session[0]["content"].split("\n\n", 1)[1] for session in items[0].history]
    assert len(chunks) > 1 and " ".join(chunks) == FACTS  # one session per chunk, and no text is lost
    assert all([message["role"] for message in session] == ["user", "assistant"] for session in items[0].history)
    # One text is one history, or its duplicate would be the donor.
    assert len({item.history_id for item in items[:4]}) == 1 and len({item.history_id for item in items}) == 3
    assert [item.new_tokens for item in items] == [10, 10, 10, 10, 50, 40]


def test_the_chunk_size_depends_on_the_source(ask, checkpoint):
    """It is 512 tokens if a text consists of short ones, and otherwise 4,096."""
    sentences = [f"Fact {number} is that Ann ran." for number in range(1, 300)]
    (longest,) = [max(token_counter(str(checkpoint))(sentences))]
    for source, size in (("ruler_qa1_197K", 512), ("factconsolidation_sh_6k", 512), ("eventqa_full", 4096)):
        (item,) = ask([row(source, " ".join(sentences), ("Who?", ["Ann"]))]).items()
        chunks = [session[0]["content"].split("\n\n", 1)[1] for session in item.history]
        counts = [sum(token_counter(str(checkpoint))(nltk.sent_tokenize(chunk))) for chunk in chunks]
        assert len(counts) > 1 and all(size - longest < count <= size for count in counts[:-1]), source


@pytest.mark.parametrize(
    ("source", "answer", "right", "expected"),
    [
        # The whole answer or its first line, whichever scores better.
        ("ruler_qa1_197K", "It was in Paris.\nI think", ["Rome", "Paris"], {"score": 1, "exact_match": 0}),
        ("ruler_qa1_197K", "So.\nAnswer: the Paris!", ["Paris"], {"score": 1, "exact_match": 1, "f1": 1}),
        ("ruler_qa1_197K", "Par", ["Paris"], {"score": 0}),
        ("factconsolidation_sh_6k", "Paris, not Oslo", ["paris"], {"score": 1, "exact_match": 0, "f1": 0.5}),
        # Labels: only the parsed answer.
        ("icl_trec_coarse_6600shot_balance", "12\nfor it is so", ["12"], {"score": 1}),
        ("icl_trec_coarse_6600shot_balance", "label: 12", ["12"], {"score": 0, "substring_exact_match": 1}),
        ("icl_trec_coarse_6600shot_balance", "I say\nanswer: 12", ["12"], {"score": 1}),
        # Events: the score is of the first line, the recall of the whole, and of every part of what is right.
        ("eventqa_full", "Well.\nBen wept", ["Ben wept"], {"score": 0, "eventqa_recall": 1}),
        ("eventqa_full", "ben WEPT, then", ["Ben wept", "Ann left"], {"score": 1, "eventqa_recall": 0}),
        ("detective_qa", "B. the butler", ["B. The butler"], {"score": 1}),
        ("detective_qa", "B", ["B. The butler"], {"score": 0}),
        # LCS "Ann ran": precision 2/3, recall 2/2.
        ("longmemeval_s*", "Ann ran far", ["Ann ran"], {"score": 0.8, "rougeL_recall": 1}),
    ],
)
def test_answers_are_scored_as_published(ask, source, answer, right, expected):
    """The benchmark's scores come from `post_process` in its `utils/eval_other_utils.py`."""
    task = ask([row(source, "Ann ran.", ("Who?", right))], without_judge=True)
    scores = task.score(task.items()[0], answer)
    assert {name: scores[name] for name in expected} == pytest.approx(expected)


def test_answers_are_parsed_as_published():
    """The benchmark parses answers in the script's `parse_output`."""
    for text, parsed in (
        ("Paris\nor Rome", "Paris"),
        ("I say. ANSWER: Paris \nAnswer: Rome", "Paris"),
        ("Answer: answer: Paris", "Paris"),
        ("", ""),
        ("Answer:", ""),
    ):
        assert first_answer(text) == parsed


def test_rouge_compares_stems():
    """`rouge-score` with stems, by hand: LCS "the cat on mat" of 6 and 5 words."""
    assert rouge("the cat sat on a mat", "the cat on the mat").f1 == pytest.approx(
        2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5)
    )
    assert rouge("running cats", "run cat").f1 == 1.0 and rouge("", "cat").f1 == 0.0
    assert rouge("a b\nc d", "c d\na b").f1 == 0.5 and rouge("a b\nc d", "c d\na b", "rougeLsum").f1 == 1.0
    assert rouge("ann", "ann ran", "rouge1").recall == 0.5


@pytest.mark.parametrize(
    ("answer", "recalls"),
    [
        ("1. Heat (1995)\n2. Alien\n3. Up\n4. Up\n5. Alien\n6. Titanik", (0.5, 0.5, 1)),
        ("I liked Titanic.\n1.Alien\n\n2) heat", (0, 0.5, 0.5)),  # text before the list does not count
        ("Heat, Titanic", (0.5, 1, 1)),
        ("Alien", (0, 0, 0)),
    ],
)
def test_recommendations_are_matched_to_titles(answer, recalls):
    """Compared with `_process_recsys_dataset` for the films 3 and 5."""
    found = Movies(TITLES).recalls(answer, ["3", " 5"])
    assert tuple(found.values()) == recalls and list(found) == [f"recsys_recall@{n}" for n in (1, 5, 10)]


def test_recommendations_without_titles_raise(ask, tmp_path):
    rows = SPLITS["Test_Time_Learning"]
    with pytest.raises(ConfigError, match="row 2 question 1 asks for recommendations"):
        ask(rows).items()
    task = ask(rows, movies=write(tmp_path / "entity2id.json", TITLES))
    items = task.items()
    assert items[1].new_tokens == 300 and "20 movies" in items[1].question[0]["content"]
    assert task.score(items[1], "1. Heat\n2. Titanic")["score"] == 1.0
    for content, says in (
        ("[", "not an entity2id.json"),
        ([3], "not a mapping"),
        ({"Heat": 3}, "row 2 question 1.*'5'"),
    ):
        with pytest.raises(DataError, match=says):
            ask(rows, movies=write(tmp_path / "entity2id.json", content)).items()
    with pytest.raises(DataError, match=r"nowhere.json"):
        ask(rows, movies=str(tmp_path / "nowhere.json")).items()


def test_sources_that_need_a_judge_raise_or_are_marked(ask):
    rows = SPLITS["Accurate_Retrieval"] + SPLITS["Long_Range_Understanding"]
    with pytest.raises(ConfigError, match=r"rows.json row 3: answers of the source longmemeval.* are judged by GPT-4o"):
        ask(rows).items()
    assert len(ask(rows, sources=UNJUDGED).items()) == 3
    items = ask(rows, without_judge=True).items()
    assert items[2].group == "accurate retrieval, longmemeval_s* (ROUGE-L F1, no judge)"
    assert "Today is 2023/05/30." in items[2].question[0]["content"]
    with pytest.raises(DataError, match="no source squad") as refused:
        ask(rows, sources="squad").items()
    assert "ruler_qa1_197K, eventqa_full" in refused.value.why


@pytest.mark.parametrize("chunk", [0, -3, 2.5, True, "many"])
def test_an_invalid_chunk_size_raises(ask, chunk):
    with pytest.raises(ConfigError, match="is not valid"):
        ask([], chunk=chunk)


def test_all_splits_of_a_dataset_are_asked(tmp_path, checkpoint, monkeypatch, punkt):
    """A folder from `hf download` is read by `datasets`, and a model answers its questions."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "bench" / "data").mkdir(parents=True)
    for split, rows in SPLITS.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bench" / "data" / f"{split}-00000-of-00001.parquet")
    options = {"data": str(tmp_path / "bench"), "tokenizer": str(checkpoint), "sources": UNJUDGED}
    items = find_task("memoryagentbench", options).items()
    assert [item.group.partition(",")[0] for item in items] == [
        "accurate retrieval",
        "accurate retrieval",
        "test-time learning",
        "long-range understanding",
        *["conflict resolution"] * 4,
    ]
    assert items[-1].where == f"{tmp_path}/bench[Conflict_Resolution] row 2 question 2"
    with pytest.raises(DataError, match="no split 'Test'"):
        find_task("memoryagentbench", {**options, "split": "Test"}).items()


def test_a_model_answers_the_benchmark(ask, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048)
    randomise(attach(model, DeltaMemConfig(rank=4)))
    task = ask(SPLITS["Accurate_Retrieval"][:1] + SPLITS["Conflict_Resolution"], chunk=40)
    evaluation = evaluate(model, tokenizer, task, EvalProtocol.parse("memory"), only=("state", "donor_state"))
    assert evaluation.groups == [
        "accurate retrieval, ruler_qa1_197K",
        "conflict resolution, factconsolidation_mh_6k",
        "conflict resolution, factconsolidation_sh_6k",
    ]
    assert len(evaluation.records) == 2 * 5 and len({record.history for record in evaluation.records}) == 2
    for record, item in zip(evaluation.records, task.items() * 2, strict=True):
        assert record.scores == task.score(item, record.answer)


@pytest.mark.parametrize(
    ("package", "needs"),
    [
        ("nltk", lambda: sentence_chunks("One.", 5, words)),
        ("tiktoken", token_counter),
        ("rouge_score.rouge_scorer", lambda: rouge("a", "a", "rouge2")),
        ("rapidfuzz", lambda: Movies(TITLES)),
    ],
)
def test_missing_packages_are_named(monkeypatch, package, needs):
    monkeypatch.setitem(sys.modules, package, None)  # Python's way to mark a module as missing
    with pytest.raises(ConfigError, match=r"needs? the package") as refused:
        needs()
    assert package in refused.value.why and "deltamem-tool[eval]" in refused.value.next
