"""Tokens that end an answer: from the generation config, the tokenizer and the chat template."""

from __future__ import annotations

import pytest
from chat.talking import TURNS, make_engine
from helpers.tiny import CHAT_TEMPLATE, END, PAD, tiny_tokenizer
from segments.templates import CHATML, GEMMA, HYBRID, LLAMA, MISTRAL, PLAIN, STRICT_MISTRAL, TOKENS
from tokenizers import AddedToken

from deltamem_tool.chat.conversation import STOP_TOKEN, Conversation, Sampling
from deltamem_tool.chat.text import ChatText
from deltamem_tool.chat.torch_engine import TorchModel

BETWEEN = (  # no end after the last message
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
)
PARTS = (  # contents are lists only
    "{% for message in messages %}{% if message.content is string %}{{ raise_exception('parts') }}{% endif %}"
    "<|im_start|>{% for part in message.content %}{{ part.text }}{% endfor %}\n<|im_end|>{% endfor %}"
)
# Like gpt-oss: the last message of an answer ends differently from the ones before it.
RETURNING = (
    "{% for message in messages %}{{ message.content }}{{ '[/INST]' if loop.last else '<|im_end|>' }}{% endfor %}"
)
WORDS = "{% for message in messages %}### {{ message.role }}\n{{ message.content }}\n\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHAT_TEMPLATE, "<|end|>"),
        (CHATML, "<|im_end|>"),
        (HYBRID, "<|im_end|>"),
        (LLAMA, "<|eot_id|>"),
        (MISTRAL, "<|end|>"),
        (STRICT_MISTRAL, "<|end|>"),
        (GEMMA, "<end_of_turn>"),
        (BETWEEN, "<|im_end|>"),
        (PARTS, "<|im_end|>"),
        (RETURNING, "[/INST]"),
        (WORDS, None),
        (PLAIN, None),
        ("{{ raise_exception('never') }}", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_message_token_is_found_in_the_template(template, end, special):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in TOKENS])
    tokenizer.chat_template = template
    text = ChatText.from_tokenizer(tokenizer)
    expected = {END} | ({tokenizer.convert_tokens_to_ids(end)} if end else set())
    assert text.stop_tokens(None) == expected
    assert text.stop_tokens(70) == text.stop_tokens([70]) == expected | {70}


def test_an_answer_ends_at_the_end_token_of_the_template():
    """The generation config has another token, and the tokenizer has none."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    engine = make_engine()
    engine.model.generation_config.eos_token_id = PAD
    engine = TorchModel(engine.model, tokenizer)
    assert engine.stop_tokens == {PAD, END}
    step = engine.step

    def ending(*inputs):
        logits, past = step(*inputs)
        logits[:, END] = 1e3
        return logits, past

    engine.step = ending
    answer = Conversation(engine).generate(TURNS[0], Sampling(6))
    assert (answer.text, answer.tokens, answer.why) == ("", (END,), STOP_TOKEN)
