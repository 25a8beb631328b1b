"""Generated episodes: determined by seed and number, growing, and never with a held-out pair."""

from __future__ import annotations

import random

import pytest

from deltamem_tool.data import dialogues
from deltamem_tool.data.dialogues import CHANGES, KIND_OF, SPLITS, Fact
from deltamem_tool.data.synthetic import DialogueEpisodes


def generated(episodes=400, seed=0, **options):
    usual = {"batch_size": 8, "facts_first": 2, "facts_last": 6, "growth": 0.5}
    return DialogueEpisodes(episodes, seed=seed, **usual | options)


def test_an_episode_depends_only_on_seed_and_number():
    first, again, other = generated(), generated(), generated(seed=1)
    backwards = [again[index] for index in reversed(range(50))][::-1]
    random.seed(3)
    assert [first[index] for index in range(50)] == backwards
    assert sum(first[index] == other[index] for index in range(50)) == 0
    assert len(list(generated(episodes=3))) == 3
    with pytest.raises(IndexError):
        first[400]


def test_the_number_of_facts_grows():
    counts = [len(episode.exchanges) for episode in generated(2000)]
    assert all(len(set(counts[start : start + 8])) == 1 for start in range(0, 2000, 8)), "a batch has one number"
    assert set(counts[:64]) == {1, 2} and set(counts[1000:]) == {1, 2, 3, 4, 5, 6}
    assert max(counts[:500]) <= 4 and min(counts) == 1
    steady = [len(episode.exchanges) for episode in generated(500, growth=0.0)]
    assert set(steady) == {1, 2, 3, 4, 5, 6}


STATED = {
    fact.say(form): fact
    for training, held_out in SPLITS.values()
    for fact in (*training, *held_out)
    for form in (*dialogues.STATEMENTS, *CHANGES)
}


def stated_in(messages):
    """The facts that `messages` state, in order, found by their words."""
    return [STATED[message["content"]] for message in messages if message["content"] in STATED]


@pytest.fixture(scope="module")
def training_facts():
    """The facts of 1,500 episodes: (facts stated in order, facts asked for)."""
    answers = {Fact(a, v).answer: Fact(a, v) for a, kind in KIND_OF.items() for v in kind.values}
    conversations = []
    for episode in generated(1500):
        conversations.append(
            (stated_in(episode.history), [answers[exchange[-1]["content"]] for exchange in episode.exchanges])
        )
    return conversations


def test_held_out_pairs_never_occur_in_training(training_facts):
    held_out = {fact for _, facts in SPLITS.values() for fact in facts}
    training_set = {fact for statements, questions in training_facts for fact in (*statements, *questions)}
    assert not training_set & held_out
    assert len(training_set) > 0.8 * sum(len(facts) for facts, _ in SPLITS.values())  # and these are most of the others
    rng = random.Random(0)
    evaluated = [fact for _ in range(200) for fact in dialogues.sample_facts(rng, 4, held_out=True)]
    assert set(evaluated) <= held_out
    for attribute, (training, held_out_values) in SPLITS.items():
        assert len(held_out_values) == len(KIND_OF[attribute].values) // 5
        assert {fact.value for fact in (*training, *held_out_values)} == set(KIND_OF[attribute].values)


def test_questions_ask_for_the_final_values(training_facts):
    changed = 0
    for statements, questions in training_facts:
        at_the_end = {fact.attribute: fact for fact in statements}
        assert sorted(at_the_end.values(), key=str) == sorted(questions, key=str)
        changed += len(statements) > len(questions)
    assert 0.05 < changed / len(training_facts) < 0.15


def test_a_change_follows_the_fact_that_it_changes():
    rng = random.Random(1)
    for held_out in (False, True):
        for _ in range(200):
            facts = dialogues.sample_facts(rng, 3, held_out)
            messages = dialogues.fact_history(rng, facts, held_out, changed=1.0)
            stated = stated_in(messages)
            assert len(stated) == 4
            (twice,) = {fact.attribute for fact in stated if [f.attribute for f in stated].count(fact.attribute) == 2}
            stale, true = [fact for fact in stated if fact.attribute == twice]
            assert true in facts and stale not in facts and stale in SPLITS[twice][held_out]


UNKNOWN = {dialogues.UNKNOWN.format(a=attribute): attribute for attribute in KIND_OF}


def unknown_in(messages):
    """(position, attribute) of each answer that something is unknown."""
    answers = enumerate(message["content"] for message in messages)
    return [(place, UNKNOWN[answer]) for place, answer in answers if answer in UNKNOWN]


def test_the_share_of_unanswerable_questions_matches_the_option():
    share, episodes = 0.25, 1500
    assert not any(unknown_in(episode.history) for episode in generated(200))
    answerable = unanswerable = alike = in_history = before_all = 0
    for episode in generated(episodes, unanswerable=share):
        stated = {fact.attribute for fact in stated_in(episode.history)}
        kinds = {KIND_OF[attribute].question for attribute in stated}
        unknown = [exchange for exchange in episode.exchanges if unknown_in(exchange)]
        asked = [exchange for exchange in episode.exchanges if exchange not in unknown]
        assert len(asked) == len(stated)
        for question, answer in unknown:
            attribute = UNKNOWN[answer["content"]]
            assert attribute not in stated and attribute in question["content"]
            alike += KIND_OF[attribute].question in kinds
        answerable, unanswerable = answerable + len(asked), unanswerable + len(unknown)
        for place, attribute in unknown_in(episode.history):
            until_then = {fact.attribute for fact in stated_in(episode.history[:place])}
            assert attribute not in until_then and attribute in episode.history[place - 1]["content"]
            in_history, before_all = in_history + 1, before_all + (not until_then)
    assert unanswerable / (answerable + unanswerable) == pytest.approx(share, abs=0.02)
    assert 0.4 * unanswerable < alike < 0.8 * unanswerable  # of the same kind as a stated fact, and of other kinds
    assert in_history > before_all > 0
