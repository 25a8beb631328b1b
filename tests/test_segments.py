"""Marks of a chat against pieces that the tests put together themselves, template by template."""

from __future__ import annotations

from copy import copy, deepcopy

import pytest
import torch
from tiny import CHAT_TEMPLATE, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from deltamem_tool.dialogues import assistant, user
from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.memory import INSIDE, LAST, OUTSIDE
from deltamem_tool.segments import encode_chat, mark_chat

CHATML = (  # Qwen2.5: a system prompt of its own where there is none
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HYBRID = (  # Qwen3: thinking only in what follows the last question, where there is a block even if it is empty
    "{% set ns = namespace(last=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set said = message.content if message.content is string else '' %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% if loop.index0 > ns.last %}<think>{{ '\n' }}"
    "{% if '</think>' in said %}{{ said.split('</think>')[0].split('<think>')[-1].strip('\n') }}{% endif %}{{ '\n' }}"
    "</think>\n\n{% endif %}{{ said.split('</think>')[-1].lstrip('\n') }}"
    "{% if message.tool_calls %}<tool_call>{{ message.tool_calls | tojson }}</tool_call>{% endif %}"
    "{% else %}{{ said }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (  # a begin token, content stripped
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ALTERNATE = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/…') }}{% endif %}{% endfor %}"
)
MISTRAL = (  # the system text is a part of the first user message
    "{{ bos_token }}" + ALTERNATE + "{% for message in turns %}{% if message.role == 'user' %}"
    "[INST] {{ system if loop.first else '' }}{{ message.content }}[/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
STRICT_MISTRAL = "{% if messages[-1].role == 'system' %}{{ raise_exception('No question.') }}{% endif %}" + MISTRAL
GEMMA = (
    "{{ bos_token }}" + ALTERNATE + "{% for message in turns %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ system if loop.first else '' }}{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
STRICT_CHATML = "{% if messages[-1].role == 'system' %}{{ raise_exception('No question.') }}{% endif %}" + CHATML
COUNTING = "{{ messages | length }}" + CHAT_TEMPLATE  # no rendering is the beginning of another
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"
TOKENS = (
    "<|begin|> <|im_start|> <|im_end|> <think> </think> <|start_header_id|> <|end_header_id|> <|eot_id|> "
    "[INST] [/INST] <start_of_turn> <end_of_turn>"
).split()

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    user("My dog is called Rex 🐕‍🦺. Dr. Smith knows him!"),
    assistant("Notéd — 好的。"),
    user("What is my dog called?"),
    assistant("Rex."),
]
SEGMENT, OPEN = "segment", "open"
CORPUS = ["one.\ntwo.\n", "one.\ntwo.\nthree", "One. It is. It was. It", "Remember"]
CORPUS += ["Rex. Dr. Smith knows! Is it so? So yes. No Two Three", *(message["content"] for message in TALK)]


@pytest.fixture(scope="module")
def special():
    """The tiny tokenizer with the special tokens of all templates."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    return tokenizer


def trained(pre_tokenizer):
    """A tokenizer with merges. Its special token is <a>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel) else []
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<unk>", "<a>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=PLAIN)


@pytest.fixture(scope="module")
def words():
    """Like `special`, with merges: a space is in the token of the word after it, as real tokenizers have it."""
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_special_tokens({"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<unk>"})
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Rex. Dr. Smith")["input_ids"])
    assert tokens == ["Rex", ".", "ĠDr", ".", "ĠSmith"]
    return tokenizer


def with_template(tokenizer, template, name="its/name"):
    other = copy(tokenizer)
    other.chat_template = template
    other.name_or_path = name
    return other


def expected(tokenizer, pieces):
    """Text, ids and marks of (text, kind) pieces; a piece's tokens are what it is tokenised to by itself."""
    text, ids, marks = "", [], []
    for piece, kind in pieces:
        own = tokenizer(piece, add_special_tokens=False)["input_ids"]
        inside = OUTSIDE if kind is None else INSIDE
        text, ids = text + piece, ids + own
        marks += [*[inside] * (len(own) - 1), LAST if kind == SEGMENT else inside]
    return text, ids, marks


# What each template writes for a conversation, as pieces; the test knows it, the code has to find it out.


def chatml(messages):
    pieces = [("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", None)]
    for message in messages:
        kind = None if message["role"] == "system" else SEGMENT
        pieces.append((f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n", kind))
    return pieces[1:] if messages[0]["role"] == "system" else pieces


def hybrid(messages):
    pieces = []
    last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=0)
    for n, message in enumerate(messages):
        kind = None if message["role"] == "system" else SEGMENT
        think = "<think>\n\n</think>\n\n" if message["role"] == "assistant" and n > last else ""
        pieces.append((f"<|im_start|>{message['role']}\n{think}{message['content']}<|im_end|>\n", kind))
    return pieces


def llama(messages):
    pieces = [("<|begin|>", None)]
    for message in messages:
        kind = None if message["role"] == "system" else SEGMENT
        header = f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n"
        pieces.append((f"{header}{message['content'].strip()}<|eot_id|>", kind))
    return pieces


def merged(messages):
    """Turns, the first with the system text in it."""
    if messages[0]["role"] != "system":
        return messages
    return [user(f"{messages[0]['content']}\n\n{messages[1]['content']}"), *messages[2:]]


def mistral(messages):
    return [
        ("<|begin|>", None),
        *(
            (f"[INST] {m['content']}[/INST]" if m["role"] == "user" else f" {m['content']}<|end|>", SEGMENT)
            for m in merged(messages)
        ),
    ]


def gemma(messages):
    names = {"user": "user", "assistant": "model"}
    turns = [
        (f"<start_of_turn>{names[m['role']]}\n{m['content'].strip()}<end_of_turn>\n", SEGMENT) for m in merged(messages)
    ]
    return [("<|begin|>", None), *turns]


CASES = {
    "chatml": (CHATML, chatml, "<|im_start|>assistant\n"),
    "chatml that needs a question": (STRICT_CHATML, chatml, "<|im_start|>assistant\n"),
    "hybrid": (HYBRID, hybrid, "<|im_start|>assistant\n"),
    "llama": (LLAMA, llama, "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "mistral": (MISTRAL, mistral, ""),
    "mistral that needs a question": (STRICT_MISTRAL, mistral, ""),
    "gemma": (GEMMA, gemma, "<start_of_turn>model\n"),
}
CONVERSATIONS = {
    "question": TALK[:1],
    "turn": TALK[:2],
    "three": TALK[:3],
    "talk": TALK,
    "with a system": [SYSTEM, *TALK],
    "question with a system": [SYSTEM, *TALK[:1]],
    "long": [SYSTEM, *TALK, *TALK, user("Ok.")],
    "empty contents": [user(""), assistant(""), user("And?"), assistant("")],
    "contents that look like templates": [user("<|im_start|>user\n"), assistant("<|im_end|>\n[INST] <|im_start|>")],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt", [False, True])
def test_every_message_is_a_segment(special, case, conversation, prompt):
    template, pieces_of, opening = CASES[case]
    tokenizer, messages = with_template(special, template), CONVERSATIONS[conversation]
    pieces = pieces_of(messages) + ([(opening, OPEN)] if prompt and opening else [])
    assert expected(tokenizer, pieces) == mark_chat(tokenizer, messages, "message", add_generation_prompt=prompt)


@pytest.mark.parametrize("granularity", ["message", "sentence"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "hybrid"])
def test_marks_of_a_beginning_are_a_beginning_of_the_marks(special, words, case, granularity):
    tokenizer = with_template(special if granularity == "message" else words, CASES[case][0])
    for messages in ([SYSTEM, *TALK, TALK[0]], [*TALK, TALK[0]]):
        whole = mark_chat(tokenizer, messages, granularity)
        # a system message that is a part of the first user message is nothing by itself
        for stop in range(1 + (messages[0] == SYSTEM), len(messages)):
            part = mark_chat(tokenizer, messages[:stop], granularity)
            prompted = mark_chat(tokenizer, messages[:stop], granularity, add_generation_prompt=True)
            assert prompted.marks[: len(part.marks)] == part.marks
            for begun in (part, prompted) if messages[stop]["role"] == "assistant" else (part,):
                assert begun.input_ids == whole.input_ids[: len(begun.input_ids)]
                assert begun.marks == whole.marks[: len(begun.marks)]
        assert whole.marks.count(LAST) == (5 if granularity == "message" else 7)


def test_a_template_that_writes_earlier_turns_differently(special):
    """The last answer has a block for thinking until another question follows."""
    tokenizer = with_template(special, HYBRID)
    thought = assistant("<think>\nA dog, then.\n</think>\n\nRex.")
    last = mark_chat(tokenizer, [*TALK[:3], thought], "message")
    earlier = mark_chat(tokenizer, [*TALK[:3], thought, user("Ok.")], "message")
    pieces = hybrid(TALK[:3])
    answer = "<|im_start|>assistant\n<think>\nA dog, then.\n</think>\n\nRex.<|im_end|>\n"
    assert last == expected(tokenizer, [*pieces, (answer, SEGMENT)])
    pieces += [("<|im_start|>assistant\nRex.<|im_end|>\n", SEGMENT), ("<|im_start|>user\nOk.<|im_end|>\n", SEGMENT)]
    assert earlier == expected(tokenizer, pieces)


def test_a_template_that_ends_a_conversation(special):
    """No rendering is the beginning of another, but every header is known from a message alone."""
    message = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    tokenizer = with_template(special, "{% for message in messages %}" + message + "{% endfor %}{{ eos_token }}")
    *pieces, (last, kind) = chatml([SYSTEM, *TALK])
    assert mark_chat(tokenizer, [SYSTEM, *TALK], "message") == expected(tokenizer, [*pieces, (last + "<|end|>", kind)])


def test_what_is_before_the_first_message_and_changes_with_it_is_a_part_of_it(special):
    tokenizer = with_template(special, "[{{ messages[0].content | length }}]" + CHAT_TEMPLATE)
    pieces = [("[10]<|user|>One and 10<|end|>", SEGMENT), ("<|assistant|>Two<|end|>", SEGMENT)]
    messages = [user("One and 10"), assistant("Two")]
    assert mark_chat(tokenizer, messages, "message") == expected(tokenizer, pieces)


def test_messages_in_a_row_and_system_messages_between(special):
    tokenizer = with_template(special, CHATML)
    messages = [
        *TALK[:1],
        user("And?"),
        SYSTEM,
        assistant("Wait."),
        {"role": "tool", "content": "[1]"},
        *TALK[1:],
        SYSTEM,
    ]
    marked = mark_chat(tokenizer, messages, "message")
    assert marked == expected(tokenizer, chatml(messages))
    assert marked.marks.count(LAST) == len(messages) - 2
    only = mark_chat(tokenizer, [SYSTEM, SYSTEM], "message", add_generation_prompt=True)
    assert only == expected(tokenizer, [*chatml([SYSTEM, SYSTEM]), ("<|im_start|>assistant\n", OPEN)])


def test_contents_that_are_no_strings(special):
    parts = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{{ part.text if part.type == 'text' else '[INST]' }}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A dog. A cat."}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    pieces = [
        (f"<|im_start|>{text}<|im_end|>\n", SEGMENT) for text in ("user\n[INST]A dog. A cat.", "assistant\nYes.") * 2
    ]
    for granularity in ("message", "sentence"):
        tokenizer = with_template(special, "<|begin|>" + parts)
        marked = mark_chat(tokenizer, [picture, answer, picture, answer], granularity)
        assert marked == expected(tokenizer, [("<|begin|>", None), *pieces])

    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    tokenizer = with_template(special, HYBRID)
    for granularity in ("message", "sentence"):
        # the call's block for thinking goes when the next question comes
        marked = mark_chat(tokenizer, [user("Look."), call, user("And?")], granularity)
        called = '<|im_start|>assistant\n<tool_call>[{"name": "look"}]</tool_call><|im_end|>\n'
        ends = [("<|im_start|>user\nLook.<|im_end|>\n", SEGMENT), ("<|im_start|>user\nAnd?<|im_end|>\n", SEGMENT)]
        assert marked == expected(tokenizer, [ends[0], (called, SEGMENT), ends[1]])


# Sentences


def test_sentences_of_a_message(words):
    tokenizer = with_template(words, CHATML)
    said = "\n\nDr. Smith paid $3.5 million, i.e. all.  Is it so? 🐕 好的。是吗？\n\nNew 'paragraph'…\n- item\n"
    messages = [SYSTEM, user(said), assistant("Yes. No.\n\n"), user(""), assistant(" \n")]
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
    assert mark_chat(tokenizer, messages, "sentence") == expected(tokenizer, pieces)
    prompted = mark_chat(tokenizer, messages, "sentence", add_generation_prompt=True)
    assert prompted == expected(tokenizer, [*pieces, ("<|im_start|>assistant\n", OPEN)])


@pytest.mark.parametrize("case", CASES)
def test_sentences_in_every_template(words, case):
    template, pieces_of, _ = CASES[case]
    tokenizer, messages = with_template(words, template), [SYSTEM, *TALK, *TALK]
    pieces = []
    for piece, kind in pieces_of(messages):  # two sentences are in the dog's message alone
        first, space, second = piece.partition(" Dr.")
        pieces += [(first, kind), (space + second, kind)] if space else [(piece, kind)]
    assert sum(kind == SEGMENT for _, kind in pieces) == 10
    assert mark_chat(tokenizer, messages, "sentence") == expected(tokenizer, pieces)


def test_a_template_that_strips_contents(words):
    tokenizer = with_template(words, LLAMA)
    messages = [user("  One. Two. \n"), assistant("\n\nThree.\n")]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    pieces = [("<|begin|>", None), (header.format("user") + "One.", SEGMENT), (" Two.<|eot_id|>", SEGMENT)]
    pieces += [(header.format("assistant") + "Three.<|eot_id|>", SEGMENT)]
    assert mark_chat(tokenizer, messages, "sentence") == expected(tokenizer, pieces)


def test_thinking_that_the_template_takes_out_is_no_sentence(words):
    tokenizer = with_template(words, HYBRID)
    thought = assistant("<think>\nHm. Hm.\n</think>\n\nRex. No.")
    marked = mark_chat(tokenizer, [TALK[2], thought, user("Ok.")], "sentence")
    pieces = hybrid([TALK[2], user("Ok.")])
    answer = [("<|im_start|>assistant\nRex.", SEGMENT), (" No.<|im_end|>\n", SEGMENT)]
    assert marked == expected(tokenizer, [pieces[0], *answer, pieces[1]])
    # The last answer's is written elsewhere than its content.
    with pytest.raises(DataError, match=r"(?s)its/name writes the content of message 2 \(assistant\).*cannot be told"):
        mark_chat(tokenizer, [TALK[2], thought], "sentence")


def test_a_split_of_ones_own(words):
    tokenizer, messages = with_template(words, CHATML), [SYSTEM, user("One. It; It was.  is"), assistant("a")]
    asked = []

    def split(text):
        asked.append(text)
        return ["One", "It; It", "\n", "is"] if "\n" in text else text.replace(".  ", ". ").split(". ")

    marked = mark_chat(tokenizer, messages, "sentence", split=split)
    assert asked == ["One. It; It was.  is", "a"]
    pieces = [("<|im_start|>user\nOne.", SEGMENT), (" It; It was. ", SEGMENT), (" is<|im_end|>\n", SEGMENT)]
    assert marked == expected(tokenizer, [chatml(messages)[0], *pieces, chatml(messages)[2]])
    # what lies between two pieces joins the first, and so does a piece of whitespace
    marked = mark_chat(tokenizer, [SYSTEM, user("\n\n- One: It; It\n\n\nis!")], "sentence", split=split)
    pieces = [("<|im_start|>user\n\n\n- One:", SEGMENT), (" It; It\n\n\n", SEGMENT), ("is!<|im_end|>\n", SEGMENT)]
    assert marked == expected(tokenizer, [chatml(messages)[0], *pieces])
    whole = mark_chat(tokenizer, messages, "sentence", split=lambda text: [text])
    assert whole == mark_chat(tokenizer, messages, "message")


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        (["One.", ""], r"has the piece '', .*Left is ' Two.'"),
        (["Two.", "One."], "the piece 'One.', which is not in what is left"),
        (["One.", "One."], "the piece 'One.'"),
        (["One.", "Three."], "the piece 'Three.'"),
        ([None], "the piece None"),
        ([], "finds no sentence"),
        ([" "], "finds no sentence"),
        ("One. Two.", "is one string"),
    ],
)
def test_a_split_that_does_not_fit_is_named(words, pieces, says):
    with pytest.raises(DataError, match=f"(?s)message 2 .user.*{says}"):
        mark_chat(with_template(words, CHATML), [SYSTEM, user("One. Two.")], "sentence", split=lambda text: pieces)


def test_a_sentence_without_a_token_is_named(words):
    tokenizer = with_template(words, PLAIN)
    assert len(tokenizer("Remember")["input_ids"]) == 1
    with pytest.raises(DataError, match=r"(?s)Sentence 'ber' of message 2 \(user\) has no token of its own.*join it"):
        mark_chat(tokenizer, [SYSTEM, user("Remember")], "sentence", split=lambda text: ["Remem", "ber"])


# Tokens and characters


def test_a_token_belongs_where_its_first_character_is():
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    messages = [user("one.\nt"), assistant("wo.\n"), user("x")]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("one.\ntwo.\nx")["input_ids"])
    assert tokens == ["one.Ċtwo.Ċ", "x"]
    with pytest.raises(DataError, match=r"(?s)Message 2 \(assistant\) has no token of its own"):
        mark_chat(tokenizer, messages, "message")
    messages = [user("one.\nt"), assistant("wo.\nx")]
    assert mark_chat(tokenizer, messages, "message").marks == [LAST, LAST]
    assert mark_chat(tokenizer, [user("one.\ntwo.\n"), user("x")], "message").marks == [LAST, LAST]


def test_tokens_that_share_a_character_stay_together():
    """Emoji are several byte tokens over one character; merged bytes can be of two characters."""
    for tokenizer in (tiny_tokenizer(), trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))):
        tokenizer.chat_template = PLAIN
        messages = [user("é🦺"), assistant("好🐕")]
        marked = mark_chat(tokenizer, messages, "message")
        first = len(tokenizer("é🦺")["input_ids"])
        assert first > 1 and len(marked.marks) > first + 1
        assert marked.marks == [INSIDE] * (first - 1) + [LAST] + [INSIDE] * (len(marked.marks) - first - 1) + [LAST]


@pytest.mark.parametrize("trim", [False, True])
def test_a_space_before_a_word_is_the_words(trim):
    byte_level = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    byte_level.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    metaspace = trained(pre_tokenizers.Metaspace())
    # a second space is a token of its own, which stays behind
    of_byte_level = ["One .", "ĠIt Ġis . Ġ", "ĠIt Ġwas . <a>"]
    of_metaspace = ["▁One.", "▁It ▁is. ▁", "▁It ▁was. <a>"]
    for tokenizer, sentences in ((byte_level, of_byte_level), (metaspace, of_metaspace)):
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}<a>{% endfor %}"
        marked = mark_chat(tokenizer, [user("One. It is.  It was.")], "sentence")
        assert tokenizer.convert_ids_to_tokens(marked.input_ids) == " ".join(sentences).split()
        lengths = [len(sentence.split()) for sentence in sentences]
        assert marked.marks == [mark for length in lengths for mark in [INSIDE] * (length - 1) + [LAST]]


@pytest.mark.parametrize("trim", [False, True])
def test_a_space_in_a_token_of_its_own_stays_behind(trim):
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    marked = mark_chat(tokenizer, [user("One. ¿")], "sentence", split=str.split)
    assert tokenizer.convert_ids_to_tokens(marked.input_ids) == ["One", ".", "Ġ", "Â", "¿"]
    assert marked.marks == [INSIDE, INSIDE, LAST, INSIDE, LAST]


class Backwards(PreTrainedTokenizerFast):
    def __call__(self, *inputs, **options):
        encoded = super().__call__(*inputs, **options)
        encoded["offset_mapping"].reverse()
        return encoded


def test_tokens_that_are_not_in_the_order_of_the_text_are_refused(special):
    tokenizer = Backwards(tokenizer_object=special.backend_tokenizer, chat_template=CHAT_TEMPLATE)
    with pytest.raises(DataError, match="not in the order of the text"):
        mark_chat(tokenizer, TALK, "message")


# Batches


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("granularity", ["token", "message", "sentence"])
def test_a_batch_is_its_conversations_with_padding(special, side, granularity):
    tokenizer = with_template(special, CHATML)
    conversations = [TALK, TALK[:1], [SYSTEM, *TALK]]
    batch = encode_chat(tokenizer, conversations, granularity, add_generation_prompt=True, padding_side=side)
    rows = [mark_chat(tokenizer, messages, granularity, add_generation_prompt=True) for messages in conversations]
    width = max(len(row.input_ids) for row in rows)
    assert batch.input_ids.shape == batch.attention_mask.shape == (3, width)
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    for n, row in enumerate(rows):
        length = len(row.input_ids)
        real = slice(width - length, width) if side == "left" else slice(0, length)
        assert batch.input_ids[n, real].tolist() == row.input_ids
        assert batch.attention_mask[n, real].tolist() == [1] * length
        assert batch.attention_mask[n].sum() == length
        assert (batch.input_ids[n][batch.attention_mask[n] == 0] == tokenizer.pad_token_id).all()
        if batch.segments is not None:
            assert batch.segments[n, real].tolist() == row.marks
            assert (batch.segments[n][batch.attention_mask[n] == 0] == OUTSIDE).all()
    if granularity == "token":
        assert batch.segments is None and all(set(row.marks) == {LAST} for row in rows)
    else:
        assert batch.segments.shape == (3, width) and batch.segments.dtype == torch.int8


def test_one_conversation_is_a_batch_of_one(special):
    tokenizer = with_template(special, CHATML)
    one, same = encode_chat(tokenizer, TALK), encode_chat(tokenizer, [TALK])
    assert torch.equal(one.input_ids, same.input_ids) and torch.equal(one.segments, same.segments)
    assert one.segments[0].tolist() == mark_chat(tokenizer, TALK, "message").marks
    chatted = tokenizer.apply_chat_template(TALK, return_dict=True, return_tensors="pt")
    assert torch.equal(one.input_ids, chatted["input_ids"])


def test_the_end_token_pads_where_there_is_no_other(special):
    tokenizer = deepcopy(with_template(special, CHATML))  # a copy shares the special tokens
    tokenizer.pad_token = None
    batch = encode_chat(tokenizer, [TALK, TALK[:1]])
    assert batch.input_ids[1, 0] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"(?s)nothing to pad with.*tokenizer.pad_token"):
        encode_chat(tokenizer, [TALK, TALK[:1]])
    assert encode_chat(tokenizer, [TALK, TALK]).attention_mask.all()


# Refusals


@pytest.mark.parametrize("granularity", ["message", "sentence"])
def test_a_template_whose_boundaries_cannot_be_told_is_refused(special, granularity):
    tokenizer = with_template(special, COUNTING, "some/model")
    assert mark_chat(tokenizer, TALK[:1], granularity).marks.count(LAST) == (1 if granularity == "message" else 2)
    says = r"(?s)message 1 \(user\) ends and message 2 \(assistant\) starts.*some/model.*role assistant.*only appends"
    with pytest.raises(DataError, match=says):
        mark_chat(tokenizer, TALK, granularity)
    with pytest.raises(DataError, match=r"^Conversation 2: Where message 1 \(user\)"):
        encode_chat(tokenizer, [TALK[:1], TALK], granularity)
    assert encode_chat(tokenizer, [TALK], "token").attention_mask.all()


@pytest.mark.parametrize(
    "template",
    [
        # the header changes with what follows
        "{% for m in messages %}<{{ m.role }}{{ messages | length }}>{{ m.content }}{% endfor %}",
        # the content stands twice
        "{{ messages[-1].content }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        # only the last messages are written
        "{% for m in messages[-2:] %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        # the length of a content is a part of its header
        "{{ messages | length }}{% for m in messages %}{{ m.content | length }}>{{ m.content }}{% endfor %}",
        # the last message comes first
        "{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        # a colon before the last answer alone, so that a header has to tell where the next question starts; it is two
        "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first and loop.previtem.role != 'user' %}"
        "{{ '\n' }}{% endif %}> {% elif m.role == 'assistant' and loop.last %}: {% endif %}{{ m.content }}{% endfor %}",
    ],
)
def test_other_templates_that_are_refused(special, template):
    with pytest.raises(DataError, match=r"cannot be told in what the chat template of its/name renders"):
        mark_chat(with_template(special, template), TALK, "message")


def test_a_template_that_writes_other_sentences_than_were_said(special):
    for template in (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }} ({{ m.content | length }}){% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.content }}{% endfor %}",
    ):
        tokenizer = with_template(special, template)
        assert mark_chat(tokenizer, TALK, "message").marks.count(LAST) == 4
        for messages in (TALK, [user("Hi."), assistant("Ho.")]):
            with pytest.raises(DataError, match=r"its/name writes the content of message 1 \(user\).*cannot be told"):
                mark_chat(tokenizer, messages, "sentence")


def test_a_message_without_a_token_is_named(special):
    tokenizer = with_template(special, PLAIN)
    with pytest.raises(DataError, match=r"(?s)Message 3 \(assistant\) has no token of its own.*writes nothing"):
        mark_chat(tokenizer, [SYSTEM, user("a"), assistant(""), user("b")], "message")
    with pytest.raises(DataError, match=r"Message 2 \(assistant\) has no token"):
        mark_chat(tokenizer, [user("a"), assistant("")], "sentence")
    silent = {"role": "system", "content": ""}
    assert mark_chat(tokenizer, [silent, user("a"), silent], "message").marks == [LAST]


def test_a_generation_prompt_that_changes_what_is_before_it(special):
    tokenizer = with_template(special, "{% if add_generation_prompt %}<think>{% endif %}" + CHAT_TEMPLATE, "a/b")
    assert mark_chat(tokenizer, TALK, "message")
    with pytest.raises(DataError, match="a/b renders the messages differently before a generation prompt"):
        mark_chat(tokenizer, TALK, "message", add_generation_prompt=True)


def test_what_the_template_refuses_is_said(special):
    tokenizer = with_template(special, MISTRAL)
    with pytest.raises(DataError, match=r"(?s)of its/name refuses the conversation.*Roles must alternate"):
        mark_chat(tokenizer, [*TALK, *TALK[1:]], "message")
    tokenizer.chat_template = "{{ messages[0].content + [] }}"
    with pytest.raises(DataError, match="(?s)refuses the conversation.*can only concatenate"):
        mark_chat(tokenizer, TALK, "message")


def test_options_and_conversations_that_cannot_be(special):
    tokenizer = with_template(special, CHATML)
    with pytest.raises(ConfigError, match="(?s)no granularity 'word'.*token, message, sentence"):
        encode_chat(tokenizer, TALK, "word")
    with pytest.raises(ConfigError, match="(?s)no padding side 'top'.*left, right"):
        encode_chat(tokenizer, TALK, padding_side="top")
    with pytest.raises(ConfigError, match='no use at granularity "message"'):
        encode_chat(tokenizer, TALK, "message", split=str.split)
    with pytest.raises(DataError, match="no conversation to encode"):
        encode_chat(tokenizer, [])
    with pytest.raises(DataError, match="Conversation 2: .*holds no message"):
        encode_chat(tokenizer, [TALK, []])
    with pytest.raises(DataError, match="holds no message"):
        mark_chat(tokenizer, [], "message")
    with pytest.raises(DataError, match="Message 2 has no role"):
        encode_chat(tokenizer, [TALK[0], {"content": "a"}])
    with pytest.raises(DataError, match="holds no message"):
        encode_chat(tokenizer, "Hello", "message")
    with pytest.raises(DataError, match="its/name has no chat template"):
        encode_chat(with_template(special, None), TALK)


def test_a_slow_tokenizer_is_refused_where_marks_are_needed():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template, tokenizer.name_or_path = PLAIN, "google/byt5"
    with pytest.raises(DataError, match="(?s)google/byt5 cannot tell.*ByT5Tokenizer is a slow.*Use a fast"):
        encode_chat(tokenizer, TALK)
    assert encode_chat(tokenizer, [user("abc")], "token").input_ids.tolist() == [[100, 101, 102]]
