"""Episodes of natural facts: parsed from their sentences alone and compared with the rules that generate them."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from data.spoken_facts import answer_in, both, question_in, statements_in

from deltamem_tool.data.fact_conversations import fact_history
from deltamem_tool.data.fact_episodes import FactEpisodes, FactOptions, Growth
from deltamem_tool.data.fact_words import (
    ACKNOWLEDGEMENTS,
    ATTRIBUTES,
    CHAT,
    CORRECTIONS,
    EVERYTHING,
    KINDS,
    NAMES,
    NOTHING,
    PLAIN,
    SMALL_TALK,
    SYSTEMS,
    UNTOLD_VALUE,
    WORDS,
    HeldOut,
    is_held_out,
)
from deltamem_tool.data.facts import sample_facts, untold_fact
from deltamem_tool.evaluation.scoring.metrics import declines

ATTRIBUTES_AT_LEAST, VALUES_AT_LEAST = 250, 200  # of a kind
REMARKS, REPLIES = ({turn[side] for turn in SMALL_TALK} for side in (0, 1))
STEADY = FactOptions(Growth(4, 4), Growth(0.5, 0.5), fewest=1.0, third_person=0.3, unanswerable=0.2)
GROWING = FactOptions(
    Growth(1, 5, 0.0, 0.6), Growth(0, 1, 0.3, 0.9), Growth(0, 2, 0.3, 0.9), Growth(0.8, 0.1, 0.0, 0.6), 0.5
)


def generated(episodes=300, seed=0, options=STEADY, held_out=NOTHING, batch_size=1):
    return FactEpisodes(episodes, batch_size, seed, options, held_out)


def is_chat(episode):
    return any(message["role"] == "assistant" for message in episode.history)


def read(episode):
    """(stated facts in order, questions with their answers). Every sentence of the episode must be parsed."""
    stated, questions = [], []
    history = [message for message in episode.history if message["role"] != "system"]
    for number, message in enumerate(history):
        if message["role"] == "user" and message["content"] not in REMARKS:
            statements = statements_in(message["content"])
            if statements is None:
                question, answer = question_in(message["content"]), answer_in(history[number + 1]["content"])
                before = [fact.value for fact in stated if fact[:2] == question[:2]]
                assert answer[:3] == (*question[:2], before[-1] if before else None), message
            else:
                stated += statements
        elif message["role"] == "assistant":
            statements = message["content"]
            assert statements in ACKNOWLEDGEMENTS or statements in REPLIES or answer_in(statements) is not None
    for exchange in episode.exchanges:
        question, answer = (
            read_in(message["content"])
            for read_in, message in zip((question_in, answer_in), exchange[-2:], strict=True)
        )
        assert question[:2] == answer[:2], exchange
        questions.append((question, answer))
    return stated, questions


def test_an_episode_depends_only_on_seed_and_number():
    first, again, other = generated(), generated(), generated(seed=1)
    backwards = [again[index] for index in reversed(range(50))][::-1]
    random.seed(3)
    assert [first[index] for index in range(50)] == backwards
    assert not any(first[index] == other[index] for index in range(50))
    with pytest.raises(IndexError):
        first[300]


def test_numbers_grow_and_never_shrink():
    growth = Growth(1, 6, 0.2, 0.7)
    numbers = [growth.at(step / 100) for step in range(101)]
    assert (
        numbers == sorted(numbers)
        and numbers[20] == 1
        and numbers[45] == pytest.approx(3.5)
        and set(numbers[70:]) == {6}
    )
    assert Growth(2, 5).at(0.0) == 5 and growth.at_end().at(0.0) == 6
    counts, chats, lengths = [], [], []
    for episode in generated(2000, options=GROWING, batch_size=8):
        counts.append(len(episode.exchanges))
        chats.append(is_chat(episode))
        lengths.append(sum(len(message["content"]) for message in episode.history))
    assert all(len(set(row[n : n + 8])) == 1 for row in (counts, chats) for n in range(0, 2000, 8)), "a batch is alike"
    tenths = range(0, 2000, 200)
    most = [max(counts[n : n + 200]) for n in tenths]
    assert most == sorted(most) and most[0] <= 2 and most[-1] == 5
    assert min(counts[-400:]) == 3, "the half of five, at least"
    shares = [sum(chats[n : n + 200]) / 200 for n in tenths]
    assert shares[:3] == [0, 0, 0] and shares[3] < 0.4 < shares[7] and shares[9] == 1
    assert sum(lengths[:200]) * 5 < sum(lengths[-200:])


def test_every_stated_fact_is_asked_for_and_answered_with_its_final_value():
    corrected = not_known = open_questions = 0
    for episode in generated(1500):
        statements, asked = read(episode)
        true = {spoken[:2]: spoken.value for spoken in statements}
        answered = [answer for _, answer in asked if answer.value is not None]
        assert {answer[:2]: answer.value for answer in answered} == true and len(answered) == len(true) == 4
        assert not any(answer[:2] in true for _, answer in asked if answer.value is None), "what is not known was told"
        corrected += len(statements) > len(true)
        not_known += any(
            answer_in(message["content"]) for message in episode.history if "not told" in message["content"]
        )
        open_questions += len(asked) - len(answered)
        questions = [message["content"] for exchange in episode.exchanges for message in exchange[-2:-1]]
        assert all(exchange[-1]["role"] == "assistant" for exchange in episode.exchanges) and len(questions) == len(
            asked
        )
    assert 0.03 < corrected / 1500 < 0.08, "a tenth of the chats, which are a half"
    assert 0.03 < not_known / 1500 < 0.08, (
        "a fifth of the questions that half of the chats, of 15 % of statements, hold"
    )
    assert 0.17 < open_questions / (open_questions + 4 * 1500) < 0.23


def test_a_correction_is_marked_and_follows_the_statement():
    rng, forms = random.Random(0), set(both(CORRECTIONS))
    for _ in range(200):
        facts = sample_facts(rng, 3, NOTHING, third_person=0.3)
        messages = fact_history(rng, facts, "chat", NOTHING, changed=1.0)
        statements = [spoken for message in messages[::2] for spoken in statements_in(message["content"]) or []]
        (twice,) = [key for key, count in Counter(spoken[:2] for spoken in statements).items() if count == 2]
        stale, true = [spoken for spoken in statements if spoken[:2] == twice]
        assert true.frame in forms and stale.frame not in forms and true.value != stale.value
        assert true.value in [fact.value for fact in facts] and stale.value not in [fact.value for fact in facts]


@pytest.mark.slow
def test_held_out_words_never_occur_in_training():
    options = FactOptions(Growth(1, 4), Growth(0.5, 0.5), Growth(0.2, 0.2), Growth(0.5, 0.2), 0.0, 0.3, 0.1)
    attributes, values, frames, owners = set(), set(), set(), set()
    for episode in generated(20_000, options=options):
        statements, questions = read(episode)
        sentences = [*statements, *(spoken for pair in questions for spoken in pair)]
        attributes |= {spoken.attribute for spoken in sentences}
        values |= {spoken.value for spoken in sentences if spoken.value is not None}
        frames |= {spoken.frame for spoken in (*statements, *(question for question, _ in questions))}
        owners |= {spoken.owner for spoken in sentences} - {"my", "the"}
    assert not any(map(is_held_out, (*attributes, *values, *frames, *owners)))
    assert len(attributes) == len({text for _, text in ATTRIBUTES[False]}), "and all of the rest is seen"
    assert frames == {
        text for part in (PLAIN, CHAT) for split in (part.statements, part.questions) for text in split[False]
    } | set(CORRECTIONS[False])
    assert len(values) > 20_000 and owners == set(NAMES[False])


@pytest.mark.parametrize("part", ["attributes", "values", "phrasings"])
def test_each_kind_of_words_is_held_out_separately(part):
    held_out = replace(NOTHING, **{part: True})
    for episode in generated(150, options=replace(STEADY, bare=Growth(0.3, 0.3)), held_out=held_out):
        statements, questions = read(episode)
        sentences = [*statements, *(answer for _, answer in questions)]
        assert {is_held_out(spoken.attribute) for spoken in sentences} == {held_out.attributes}
        assert {is_held_out(spoken.value) for spoken in sentences if spoken.value is not None} == {held_out.values}
        spoken_frames = [spoken.frame for spoken in (*statements, *(question for question, _ in questions))]
        assert set(map(is_held_out, spoken_frames)) == {held_out.phrasings}


def test_no_value_occurs_in_another_fact():
    """Answers are scored by their values, so no value may occur in a sentence about another fact."""
    for episode in generated(
        500, options=replace(STEADY, facts=Growth(8, 8), bare=Growth(0.3, 0.3)), held_out=EVERYTHING
    ):
        _, questions = read(episode)
        for question, answer in questions:
            others = [other.value for _, other in questions if other.value is not None and other is not answer]
            text = episode.exchanges[questions.index((question, answer))][-1]["content"]
            assert not any(re.search(rf"\b{re.escape(value)}\b", text) for value in others)
            assert answer.value is None or answer.value in text


def test_half_of_the_untold_facts_resemble_stated_ones():
    rng, kin = random.Random(0), 0
    for _ in range(1000):
        facts = sample_facts(rng, 2, EVERYTHING, third_person=0.3)
        other = untold_fact(rng, facts, EVERYTHING, third_person=0.3)
        assert other.key not in {fact.key for fact in facts} and is_held_out(other.attribute)
        kin += other.kind in {fact.kind for fact in facts}
    assert 450 < kin < 650


def test_the_share_of_bare_words_matches_the_options():
    facts = [fact for n in range(300) for fact in sample_facts(random.Random(n), 4, NOTHING, bare=0.4)]
    words = set(WORDS[False])
    assert 0.35 < sum(fact.value in words for fact in facts) / len(facts) < 0.45
    assert len({fact.value for fact in facts if fact.value in words}) > 400, "out of thousands"


def test_there_are_many_attributes_and_many_values_of_every_kind():
    assert len(ATTRIBUTES[False]) + len(ATTRIBUTES[True]) >= ATTRIBUTES_AT_LEAST
    assert 0.1 < len(ATTRIBUTES[True]) / len(ATTRIBUTES[False]) < 0.3
    for kind in KINDS:
        for held_out in (False, True):
            rng = random.Random(kind.name)
            values = {kind.value(rng, held_out) for _ in range(4 * VALUES_AT_LEAST)}
            assert len(values) >= VALUES_AT_LEAST / (4 if held_out else 1), kind.name
            assert kind.attributes[held_out], kind.name


def test_sentences_read_as_sentences():
    texts = [
        message["content"]
        for held_out in (NOTHING, EVERYTHING)
        for episode in generated(400, options=replace(GROWING, replies=0.3, unanswerable=0.2), held_out=held_out)
        for message in (*episode.history, *(part for exchange in episode.exchanges for part in exchange))
    ]
    for text in texts:
        assert text[0].isupper() and text[-1] in ".!?", text
        assert not re.search(r"[{}]|\s\s|\s[.,!?]|[.,!?]{2}|\bi\b|\byou (prefers|likes|wants)\b", text), text
        assert "Your" not in text or text.count("your") + text.count("Your") >= 1


def test_unrelated_replies_occur_in_whole_batches():
    options = replace(STEADY, unanswerable=0.0, replies=0.3)
    trains = []
    for episode in generated(800, options=options, batch_size=4):
        replies = [exchange[-1]["content"] for exchange in episode.exchanges[4:]]
        assert len(replies) <= 1 and set(replies) <= REPLIES | set(ACKNOWLEDGEMENTS)
        trains.append(bool(replies))
    assert all(len(set(trains[n : n + 4])) == 1 for n in range(0, 800, 4)) and 0.2 < sum(trains) / 800 < 0.4


def test_an_answer_names_the_attribute_before_the_value_and_before_saying_that_it_is_unknown():
    for episode in generated(200):
        for exchange in episode.exchanges:
            question, answer = question_in(exchange[-2]["content"]), exchange[-1]["content"]
            value = answer_in(answer).value or UNTOLD_VALUE
            assert answer.index(question.attribute) + len(question.attribute) < answer.index(value)
            assert value != UNTOLD_VALUE or declines(answer)


def test_questions_see_the_system_prompt_of_their_chat():
    for episode in generated(200):
        system = [message for message in episode.history if message["role"] == "system"]
        assert all(
            exchange[: len(system)] == system and len(exchange) == len(system) + 2 for exchange in episode.exchanges
        )
        assert not system or (is_chat(episode) and system[0]["content"] in SYSTEMS)
    first = next(iter(generated(2, options=replace(STEADY, system=""))))
    assert first.history[0] == {"role": "system", "content": ""}


def test_holding_out_words_ignores_case():
    assert is_held_out("Rex Harper") == is_held_out("rex harper") and HeldOut() == NOTHING
