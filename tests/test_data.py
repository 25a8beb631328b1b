"""Conversations become episodes, episodes become tensors: every token where it belongs, every bad line named."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tiny import write_jsonl

from deltamem_tool import dialogues
from deltamem_tool.chat_template import render
from deltamem_tool.data import IGNORED, ChatEpisodes, DialogueEpisodes, Episode, EpisodeCollator
from deltamem_tool.dialogues import CHANGES, KIND_OF, SPLITS, Fact, assistant, user
from deltamem_tool.errors import DataError
from deltamem_tool.memory import LAST, OUTSIDE
from deltamem_tool.segments import encode_chat

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [user("My dog is called Rex."), assistant("Noted."), user("What is my dog called?"), assistant("Rex.")]


# Files


def test_the_last_turn_is_asked_and_the_rest_is_history(tmp_path):
    tool = {"role": "tool", "content": "found"}
    longer = [SYSTEM, *TALK, user("And now?"), assistant("Wait."), tool, assistant("Rex still.")]
    episodes = ChatEpisodes(write_jsonl(tmp_path / "chats", [TALK, [SYSTEM, *TALK], longer]))
    assert len(episodes) == 3
    assert episodes[0] == Episode(TALK[:2], [TALK[2:]])
    assert episodes[1] == Episode([SYSTEM, *TALK[:2]], [[SYSTEM, *TALK[2:]]])
    assert episodes[2] == Episode([SYSTEM, *TALK], [[SYSTEM, *longer[5:]]])


def test_a_line_is_what_ends_with_a_line_feed(tmp_path):
    """Other separators of Unicode are text inside of a JSON string."""
    said = "one\u2028two\u0085three\x0cfour"
    path = tmp_path / "chats"
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(json.dumps({"messages": [*TALK[:3], assistant("a\u2028b\u0085c")]}, ensure_ascii=False) + "\r\n")
        file.write("\n  \n")
        file.write(json.dumps({"messages": [user(said), *TALK[1:]]}, ensure_ascii=False))
    episodes = ChatEpisodes(path)
    assert len(episodes) == 2
    assert episodes[0].exchanges[0][-1]["content"] == "a\u2028b\u0085c"
    assert episodes[1].history[0]["content"] == said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json}", "is not JSON"),
        ('{"messages": [', "is not JSON"),
        ("[]", "no list `messages`"),
        ('{"messages": {}}', "no list `messages`"),
        ('{"messages": []}', "asks nothing"),
        ('{"messages": ["hello"]}', "message 1 has no role"),
        ('{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}', "message 2 has no role"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "message 1 has no role.*system, user, assistant, tool"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "message 1 has no role"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no text"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1 has no text"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "asks nothing"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "no history"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    path = write_jsonl(tmp_path / "chats", [TALK])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(DataError, match=f"(?s){says}") as refusal:
        ChatEpisodes(path)
    assert f"{path}:3" in str(refusal.value)


def test_files_without_text_are_named(tmp_path):
    with pytest.raises(DataError, match="no data file"):
        ChatEpisodes(tmp_path / "nowhere")
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(DataError, match="no conversation"):
        ChatEpisodes(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b'{"messages": "caf\xe9"}\n')
    with pytest.raises(DataError, match="UTF-8"):
        ChatEpisodes(tmp_path / "latin")


# Tensors


@pytest.fixture(scope="module")
def batch_and_episodes(tokenizer):
    episodes = [
        Episode(TALK, [[SYSTEM, user("My dog?"), assistant("It is called Rex, a fine dog.")], [*TALK[2:]]]),
        Episode([SYSTEM, *TALK, *TALK], [[user("Who?"), assistant("Ünïcode, 42!"), user("Sure?"), assistant("Yes.")]]),
    ]
    return EpisodeCollator(tokenizer, 1000, 1000)(episodes), episodes


def test_labels_are_the_answers_and_nothing_else(tokenizer, batch_and_episodes):
    batch, episodes = batch_and_episodes
    exchanges = [exchange for episode in episodes for exchange in episode.exchanges]
    assert batch["rows"].tolist() == [0, 0, 1]
    for row, exchange in enumerate(exchanges):
        scored = batch["labels"][row] != IGNORED
        assert tokenizer.decode(batch["read_ids"][row][scored]) == exchange[-1]["content"] + "<|end|>"
        assert torch.equal(batch["labels"][row][scored], batch["read_ids"][row][scored])
        text = batch["read_ids"][row][batch["read_mask"][row].bool()]
        assert tokenizer.decode(text) == render(tokenizer, exchange)
        assert not (scored & ~batch["read_mask"][row].bool()).any()


def test_what_is_written_is_the_history(tokenizer, batch_and_episodes):
    batch, episodes = batch_and_episodes
    for row, episode in enumerate(episodes):
        mask = batch["write_mask"][row].bool()
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # padding on the right
        assert tokenizer.decode(batch["write_ids"][row][mask]) == render(tokenizer, episode.history)


def test_histories_are_cut_from_the_left(tokenizer):
    long, short = Episode(TALK * 5, [TALK[2:]]), Episode(TALK[:2], [TALK[2:]])
    whole = EpisodeCollator(tokenizer, 10_000, 100)([long, short])
    cut = EpisodeCollator(tokenizer, 20, 100)([long, short])
    for row in range(2):
        text = whole["write_ids"][row][whole["write_mask"][row].bool()]
        kept = cut["write_ids"][row][cut["write_mask"][row].bool()]
        assert torch.equal(kept, text[-20:])
    assert cut["write_ids"].shape == (2, 20)
    assert torch.equal(cut["labels"], whole["labels"])


@pytest.mark.parametrize("granularity", ["message", "sentence"])
def test_segments_are_those_of_the_chat(tokenizer, granularity):
    """Cut from the left with their tokens, and padded on the right like them."""
    histories = [[SYSTEM, *TALK], [user("I moved. My dog too."), assistant("Good. Where?"), user("To Oslo.")]]
    episodes = [Episode(history, [TALK[2:]]) for history in histories]
    collator = EpisodeCollator(tokenizer, max_write_tokens=20, max_read_tokens=100, granularity=granularity)
    batch = collator(episodes)
    for row, history in enumerate(histories):
        chat = encode_chat(tokenizer, history, granularity)
        kept = min(20, chat.input_ids.shape[1])
        assert batch["write_ids"][row, :kept].tolist() == chat.input_ids[0, -kept:].tolist()
        assert batch["write_segments"][row, :kept].tolist() == chat.segments[0, -kept:].tolist()
        assert (batch["write_segments"][row, kept:] == OUTSIDE).all()
    assert (batch["write_segments"] == LAST).sum() >= len(histories)
    assert "write_segments" not in EpisodeCollator(tokenizer, 20, 100)(episodes)


def test_an_exchange_that_is_too_long_is_named(tokenizer):
    episode = Episode(TALK[:2], [[user("Why?"), assistant("because " * 40)]])
    with pytest.raises(DataError, match=r"(?s)more than max_read_tokens = 30.*Why\?.*Raise max_read_tokens"):
        EpisodeCollator(tokenizer, 100, 30)([episode])


def test_templates_that_do_not_fit_are_named(tokenizer):
    from copy import copy

    other = copy(tokenizer)
    other.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        EpisodeCollator(other, 10, 10)
    # one that counts messages: the prompt is no beginning of the whole
    other.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="only appends"):
        EpisodeCollator(other, 100, 100)([Episode(TALK[:2], [TALK[2:]])])


def test_a_file_is_checked_before_it_is_trained_on(tokenizer, tmp_path):
    from copy import copy

    short = [*TALK[:2], user("Why?"), assistant("So.")]
    path = write_jsonl(tmp_path / "chats.jsonl", [short] * 3 + [[*TALK[:2], user("Why?"), assistant("because " * 40)]])
    episodes = ChatEpisodes(path)
    EpisodeCollator(tokenizer, 10, 1000).check(episodes.episodes)
    with pytest.raises(DataError, match=r"chats.jsonl:4: An exchange has .*max_read_tokens = 30"):
        EpisodeCollator(tokenizer, 10, 30).check(episodes.episodes)
    strict = copy(tokenizer)
    refuse = "{% if messages[-1].content | length > 99 %}{{ raise_exception('too long') }}{% endif %}"
    strict.chat_template = refuse + tokenizer.chat_template
    with pytest.raises(DataError, match=r"(?s)chats.jsonl:4: The chat template refuses.*too long"):
        EpisodeCollator(strict, 10, 1000).check(episodes.episodes)


# Generated


def generated(episodes=400, seed=0, **options):
    usual = {"batch_size": 8, "facts_first": 2, "facts_last": 6, "growth": 0.5}
    return DialogueEpisodes(episodes, seed=seed, **usual | options)


def test_an_episode_depends_on_seed_and_number_alone():
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
    fact._say(form): fact
    for training, held_out in SPLITS.values()
    for fact in (*training, *held_out)
    for form in (*dialogues.STATEMENTS, *CHANGES)
}


def stated_in(messages):
    """The facts that `messages` state, in order, found by their words."""
    return [STATED[message["content"]] for message in messages if message["content"] in STATED]


@pytest.fixture(scope="module")
def said_in_training():
    """What 1,500 episodes say: (facts stated in order, facts asked for)."""
    answers = {Fact(a, v).answer: Fact(a, v) for a, kind in KIND_OF.items() for v in kind.values}
    said = []
    for episode in generated(1500):
        said.append((stated_in(episode.history), [answers[exchange[-1]["content"]] for exchange in episode.exchanges]))
    return said


def test_held_out_pairs_are_never_seen_in_training(said_in_training):
    held_out = {fact for _, facts in SPLITS.values() for fact in facts}
    seen = {fact for stated, asked in said_in_training for fact in (*stated, *asked)}
    assert not seen & held_out
    assert len(seen) > 0.8 * sum(len(facts) for facts, _ in SPLITS.values())  # and it is no small corner of the rest
    rng = random.Random(0)
    evaluated = [fact for _ in range(200) for fact in dialogues.sample_facts(rng, 4, held_out=True)]
    assert set(evaluated) <= held_out
    for attribute, (training, kept) in SPLITS.items():
        assert len(kept) == len(KIND_OF[attribute].values) // 5
        assert {fact.value for fact in (*training, *kept)} == set(KIND_OF[attribute].values)


def test_what_is_asked_is_what_is_true_at_the_end(said_in_training):
    changed = 0
    for stated, asked in said_in_training:
        at_the_end = {fact.attribute: fact for fact in stated}
        assert sorted(at_the_end.values(), key=str) == sorted(asked, key=str)
        changed += len(stated) > len(asked)
    assert 0.05 < changed / len(said_in_training) < 0.15


def test_a_change_follows_what_it_changes():
    rng = random.Random(1)
    for held_out in (False, True):
        for _ in range(200):
            facts = dialogues.sample_facts(rng, 3, held_out)
            messages = dialogues.telling(rng, facts, held_out, changed=1.0)
            stated = stated_in(messages)
            assert len(stated) == 4
            (twice,) = {fact.attribute for fact in stated if [f.attribute for f in stated].count(fact.attribute) == 2}
            stale, true = [fact for fact in stated if fact.attribute == twice]
            assert true in facts and stale not in facts and stale in SPLITS[twice][held_out]
