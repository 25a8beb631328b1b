"""Sentences as segments: where a message is split, and user-defined splits that do not fit."""

from __future__ import annotations

import pytest
from segments.templates import (
    CASES,
    CHATML,
    HYBRID,
    LLAMA,
    OPEN,
    PLAIN,
    SEGMENT,
    SYSTEM,
    TALK,
    chatml,
    expected,
    hybrid,
    with_template,
)

from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.errors import DataError
from deltamem_tool.segments.encode import tag_chat


def test_a_message_is_split_into_sentences(merging_tokenizer):
    tokenizer = with_template(merging_tokenizer, CHATML)
    text = "\n\nDr. Smith paid $3.5 million, i.e. all.  Is it so? 🐕 好的。是吗？\n\nNew 'paragraph'…\n- item\n"
    messages = [SYSTEM, user(text), assistant("Yes. No.\n\n"), user(""), assistant(" \n")]
    pieces = [
        ("<|im_start|>system\nBe brief.<|im_end|>\n", None),
        ("<|im_start|>user\n\n\nDr. Smith paid $3.5 million, i.e. all. ", SEGMENT),
        (" Is it so?", SEGMENT),
        (" 🐕 好的。", SEGMENT),
        ("是吗？\n\n", SEGMENT),
        ("New 'paragraph'…\n- item\n<|im_end|>\n", SEGMENT),
        ("<|im_start|>assistant\nYes.", SEGMENT),
        (" No.\n\n<|im_end|>\n", SEGMENT),
        ("<|im_start|>user\n<|im_end|>\n", SEGMENT),
        ("<|im_start|>assistant\n \n<|im_end|>\n", SEGMENT),
    ]
    assert tag_chat(tokenizer, messages, "sentence") == expected(tokenizer, pieces)
    prompted = tag_chat(tokenizer, messages, "sentence", add_generation_prompt=True)
    assert prompted == expected(tokenizer, [*pieces, ("<|im_start|>assistant\n", OPEN)])


@pytest.mark.parametrize("case", CASES)
def test_sentences_are_tagged_in_every_template(merging_tokenizer, case):
    template, pieces_of, _ = CASES[case]
    tokenizer, messages = with_template(merging_tokenizer, template), [SYSTEM, *TALK, *TALK]
    pieces = []
    for piece, kind in pieces_of(messages):  # two sentences are in the dog's message alone
        first, space, second = piece.partition(" Dr.")
        pieces += [(first, kind), (space + second, kind)] if space else [(piece, kind)]
    assert sum(kind == SEGMENT for _, kind in pieces) == 10
    assert tag_chat(tokenizer, messages, "sentence") == expected(tokenizer, pieces)


def test_a_template_that_strips_contents_is_tagged(merging_tokenizer):
    tokenizer = with_template(merging_tokenizer, LLAMA)
    messages = [user("  One. Two. \n"), assistant("\n\nThree.\n")]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    pieces = [("<|begin|>", None), (header.format("user") + "One.", SEGMENT), (" Two.<|eot_id|>", SEGMENT)]
    pieces += [(header.format("assistant") + "Three.<|eot_id|>", SEGMENT)]
    assert tag_chat(tokenizer, messages, "sentence") == expected(tokenizer, pieces)


def test_thinking_removed_by_the_template_is_not_a_sentence(merging_tokenizer):
    tokenizer = with_template(merging_tokenizer, HYBRID)
    thought = assistant("<think>\nHm. Hm.\n</think>\n\nRex. No.")
    tagged = tag_chat(tokenizer, [TALK[2], thought, user("Ok.")], "sentence")
    pieces = hybrid([TALK[2], user("Ok.")])
    answer = [("<|im_start|>assistant\nRex.", SEGMENT), (" No.<|im_end|>\n", SEGMENT)]
    assert tagged == expected(tokenizer, [pieces[0], *answer, pieces[1]])
    # The last answer's thinking is not in its content.
    with pytest.raises(DataError, match=r"(?s)its/name does not show where the content of message 2 \(assistant\) is"):
        tag_chat(tokenizer, [TALK[2], thought], "sentence")


def test_a_user_defined_split_is_used(merging_tokenizer):
    tokenizer, messages = (
        with_template(merging_tokenizer, CHATML),
        [SYSTEM, user("One. It; It was.  is"), assistant("a")],
    )
    texts = []

    def split(text):
        texts.append(text)
        return ["One", "It; It", "\n", "is"] if "\n" in text else text.replace(".  ", ". ").split(". ")

    tagged = tag_chat(tokenizer, messages, "sentence", split=split)
    assert texts == ["One. It; It was.  is", "a"]
    pieces = [("<|im_start|>user\nOne.", SEGMENT), (" It; It was. ", SEGMENT), (" is<|im_end|>\n", SEGMENT)]
    assert tagged == expected(tokenizer, [chatml(messages)[0], *pieces, chatml(messages)[2]])
    # text between two pieces joins the first one, as does a piece of whitespace
    tagged = tag_chat(tokenizer, [SYSTEM, user("\n\n- One: It; It\n\n\nis!")], "sentence", split=split)
    pieces = [("<|im_start|>user\n\n\n- One:", SEGMENT), (" It; It\n\n\n", SEGMENT), ("is!<|im_end|>\n", SEGMENT)]
    assert tagged == expected(tokenizer, [chatml(messages)[0], *pieces])
    whole = tag_chat(tokenizer, messages, "sentence", split=lambda text: [text])
    assert whole == tag_chat(tokenizer, messages, "message")


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        (["One.", ""], r"has the piece '', .*The rest begins: ' Two.'"),
        (["Two.", "One."], "the piece 'One.', which is not in the rest of"),
        (["One.", "One."], "the piece 'One.'"),
        (["One.", "Three."], "the piece 'Three.'"),
        ([None], "the piece None"),
        ([], "finds no sentence"),
        ([" "], "finds no sentence"),
        ("One. Two.", "is a string, not a list"),
    ],
)
def test_a_user_defined_split_that_does_not_fit_raises(merging_tokenizer, pieces, says):
    with pytest.raises(DataError, match=f"(?s)message 2 .user.*{says}"):
        tag_chat(
            with_template(merging_tokenizer, CHATML), [SYSTEM, user("One. Two.")], "sentence", split=lambda text: pieces
        )


def test_a_sentence_without_tokens_is_named(merging_tokenizer):
    tokenizer = with_template(merging_tokenizer, PLAIN)
    assert len(tokenizer("Remember")["input_ids"]) == 1
    with pytest.raises(DataError, match=r"(?s)Sentence 'ber' of message 2 \(user\) has no token of its own.*merge it"):
        tag_chat(tokenizer, [SYSTEM, user("Remember")], "sentence", split=lambda text: ["Remem", "ber"])
