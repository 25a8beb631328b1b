"""The shipped adapter: recall of facts, answers about unknown facts, and other replies."""

from __future__ import annotations

import random

import pytest

from deltamem_tool.adapter.load import load
from deltamem_tool.base_model.tokenizer import tokenizer_of
from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.chat.torch_engine import TorchModel
from deltamem_tool.data import dialogues
from deltamem_tool.evaluation.conditions import EvalProtocol
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.tasks.recall import FALSE_ANSWER, NEVER_TOLD, Recall

FACTS, EPISODES = (1, 4, 8), 60  # half of the questions are about facts that were not stated
MIN_RECALL = (0.9, 0.9, 0.8)
MAX_FALSE_ANSWERS = 0.1  # of the questions about facts that were not stated
MAX_CONTROL = 0.05  # of all questions with another conversation's state, which contains the same value by chance
CHATS, TOLD = 5, 8
MAX_GARBLED = 0.05  # of the replies; without `history_kl`, it was more than half
REPLIES = {*dialogues.ACKNOWLEDGEMENTS, *(reply for _, reply in dialogues.SMALL_TALK)}


@pytest.fixture(scope="module")
def model():
    return load("builtin:adapter")


@pytest.fixture(scope="module")
def recall(model):
    task, protocol = Recall(FACTS, EPISODES, unanswerable=0.5), EvalProtocol.parse("memory")
    return evaluate(model, tokenizer_of(model), task, protocol, only=("state", "donor_state"))


def test_the_shipped_adapter_recalls_facts(recall):
    groups = [group for group in recall.groups if not group.endswith(NEVER_TOLD)]
    for group, least in zip(groups, MIN_RECALL, strict=True):
        assert recall.estimate("exact", "state", group).mean >= least, group
    of_donors = [score for group in groups for score in recall.scores("exact", "donor_state", group)[0]]
    assert sum(of_donors) / len(of_donors) <= MAX_CONTROL


def test_the_shipped_adapter_says_when_it_does_not_know(recall):
    records = [each for each in recall.records if each.condition == "state" and each.group.endswith(NEVER_TOLD)]
    assert len(records) == len(FACTS) * EPISODES / 2
    assert sum(each.scores[FALSE_ANSWER] for each in records) / len(records) <= MAX_FALSE_ANSWERS
    assert sum(each.scores["exact"] for each in records) / len(records) >= 1 - MAX_FALSE_ANSWERS


def test_replies_are_not_garbled_after_several_facts(model):
    engine, garbled = TorchModel(model, tokenizer_of(model)), []
    for seed in range(CHATS):
        rng, chat = random.Random(seed), Conversation(engine)
        for fact in dialogues.sample_facts(rng, TOLD, held_out=True):
            reply = chat.generate(fact.statement(rng), Sampling(max_new_tokens=24)).text
            garbled += [] if reply in REPLIES else [reply]
    assert len(garbled) <= MAX_GARBLED * CHATS * TOLD, garbled
