"""Short handwritten rows in the published formats of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

TALK = {
    "sample_id": "talk-7",
    "conversation": {
        "speaker_a": "Ann",
        "speaker_b": "Ben",
        "session_1_date_time": "1 pm on 8 May, 2023",
        "session_1": [
            {"speaker": "Ann", "dia_id": "D1:1", "text": "I ran a race."},
            {"speaker": "Ann", "dia_id": "D1:2", "text": "It rained.", "blip_caption": "a wet road"},
            {"speaker": "Ben", "dia_id": "D1:3", "text": "Well done!"},
        ],
        "session_2_date_time": "9 am on 1 June, 2023",
        "session_2": [{"speaker": "Ben", "dia_id": "D2:1", "text": "I moved to Oslo."}],
        "session_10_date_time": "9 am on 2 June, 2023",
        "session_10": [],
    },
    "qa": [
        {"question": "What did Ann do, and where is Ben?", "answer": "ran a race, Oslo", "category": 1, "evidence": []},
        {"question": "When did Ann run?", "answer": 2023, "category": 2, "evidence": ["D1:1"]},
        {"question": "Is Ann fit?", "answer": "Likely yes; she runs races", "category": 3, "evidence": ["D1:1"]},
        {"question": "Where does Ben live?", "answer": "Oslo", "category": 4, "evidence": ["D2:1"]},
        {"question": "When did Ben run?", "adversarial_answer": "8 May", "category": 5, "evidence": ["D1:1"]},
    ],
}
QUESTION = {
    "_id": "5a8b",
    "question": "Were Ann and Ben both runners?",
    "answer": "yes",
    "type": "comparison",
    "level": "hard",
    "supporting_facts": [["Ann", 0]],
    "context": [["Ann", ["Ann ran.", " She won."]], ["Ben", ["Ben ran too."]]],
}
FACTS = "Here are facts. 0. Ann lives in Oslo. 1. Ben lives in Rome. 2. Ann lives in Paris."
TITLES = {
    "<http://dbpedia.org/resource/Heat_(1995_film)>": 3,
    "<http://dbpedia.org/resource/Up_(2009_film)>": 4,
    "<http://dbpedia.org/resource/Titanic_(1997_film)>": 5,
    "<http://dbpedia.org/resource/Alien>": 6,
}


def row(source: str, context: str, *asked: tuple[str, list[str]], **metadata) -> dict:
    """A row of MemoryAgentBench with its four columns."""
    questions, answers = [question for question, _ in asked], [right for _, right in asked]
    return {"context": context, "questions": questions, "answers": answers, "metadata": {"source": source, **metadata}}


SPLITS = {
    "Accurate_Retrieval": [
        row("ruler_qa1_197K", "Document 1: Ann ran. Document 2: Ben swam.", ("Who ran?", ["Ann", "Ann Lee"])),
        row("eventqa_full", "Ann left. Ben wept.", ("After Ann left?\n['Ben wept', 'Ben won']", ["Ben wept"])),
        row("longmemeval_s*", "User: I ran.", ("Did I run?", ["Yes"]), question_dates=["2023/05/30"]),
    ],
    "Test_Time_Learning": [
        row("icl_trec_coarse_6600shot_balance", "Who ran?\nlabel: 3\n", ("Who won?", ["3"]), question_dates=None),
        row("recsys_redial_full", "User: I like Heat.", ("User: What else?", ["3", "5"])),
    ],
    "Long_Range_Understanding": [
        row("detective_qa", "The butler hid.", ("Who did it? A. Ann B. The butler", ["B. The butler"])),
        row("infbench_sum_eng_shots2", "Ann ran far.", ("Summarise.", ["Ann ran."])),
    ],
    "Conflict_Resolution": [
        row("factconsolidation_mh_6k", FACTS, ("Who lives with {Ben}?", ["nobody"]), ("Where is Ann?", ["Paris"])),
        row("factconsolidation_sh_6k", FACTS, ("Where does Ann live?", ["Paris"]), ("Where Ben?", ["Rome"])),
    ],
}


def write(path: Path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)
