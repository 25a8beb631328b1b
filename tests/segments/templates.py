"""Chat templates of published models, and the pieces that each of them writes for a conversation."""

from __future__ import annotations

from helpers import tiny
from helpers.tiny import CHAT_TEMPLATE

from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.segments.tags import SegmentTag

CHATML = (  # Qwen2.5: adds its own system prompt if there is none
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HYBRID = (  # Qwen3: thinking blocks only after the last question, even empty ones
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
MISTRAL = (  # the system prompt is a part of the first user message
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


def with_template(tokenizer, template, name="its/name"):
    other = tiny.with_template(tokenizer, template)
    other.name_or_path = name
    return other


def expected(tokenizer, pieces):
    """Text, ids and tags of (text, kind) pieces; a piece's tokens are what it is tokenised to by itself."""
    text, ids, tags = "", [], []
    for piece, kind in pieces:
        own = tokenizer(piece, add_special_tokens=False)["input_ids"]
        inside = SegmentTag.OUTSIDE if kind is None else SegmentTag.INSIDE
        text, ids = text + piece, ids + own
        tags += [*[inside] * (len(own) - 1), SegmentTag.LAST if kind == SEGMENT else inside]
    return text, ids, tags


# The text that each template writes for a conversation, as pieces, which the code has to find by itself.


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
    """The turns, with the system prompt in the first one."""
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
