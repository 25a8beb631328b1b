"""Text of an exported folder: its chat template and its tokens without transformers."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer

from deltamem_tool.chat.conversation import Conversation, Sampling
from deltamem_tool.chat.text import ChatText, TextStream
from deltamem_tool.errors import ExportError
from deltamem_tool.onnx.runtime.engine import OnnxModel


def test_text_streams_in_whole_characters(qwen3):
    tokenizer = ChatText.from_folder(qwen3.folder).tokenizer
    text = "a Zoë 🐈!"
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text).ids]
    assert [piece for piece in pieces if piece] == list(text)
    # Bytes that never form a character become one replacement character, before other text or at the end.
    cat = tokenizer.encode("🐈").ids
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in cat[:2]] == ["", ""]
    assert stream.flush() == "\ufffd" and stream.flush() == ""


def test_saved_truncation_and_padding_of_a_tokenizer_are_ignored(qwen3, folder):
    text = "a text of more than eight tokens"
    for name, setting in (("truncation", {"max_length": 8}), ("padding", {"length": 64})):
        tokenizer = Tokenizer.from_file(str(qwen3.folder / "tokenizer.json"))
        getattr(tokenizer, f"enable_{name}")(**setting)
        tokenizer.save(str(folder / "tokenizer.json"))
        assert ChatText.from_folder(folder).encode(text) == qwen3.tokenizer(text).input_ids


def test_a_byte_order_mark_before_a_template_is_ignored(folder):
    messages = [{"role": "user", "content": "Hi"}]
    expected = ChatText.from_folder(folder).render(messages)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / name).write_text("\ufeff" + (folder / name).read_text(encoding="utf-8"), encoding="utf-8")
    assert ChatText.from_folder(folder).render(messages) == expected


def test_the_chat_template_renders_as_in_transformers(qwen3, folder):
    messages = [{"role": "system", "content": " Be <brief>. "}, {"role": "user", "content": "Hi"}]
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
        "    {%- generation %}{{ m.role | upper }}: {{ m | tojson }}{% endgeneration %}\n"
        "    {% if loop.last %}{% break %}{% endif %}\n{% endfor %}\n{{ eos_token }}{{ strftime_now('%Y')[:2] }}"
    )
    for source in (qwen3.tokenizer.chat_template, template):
        (folder / "chat_template.jinja").write_text(source)
        expected = qwen3.tokenizer.apply_chat_template(
            messages, chat_template=source, add_generation_prompt=True, tokenize=False
        )
        assert ChatText.from_folder(folder).render(messages) == expected
    with pytest.raises(ExportError, match="no tools"):
        ChatText.from_folder(folder).render([{"role": "tool", "content": ""}])
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(ExportError, match="unsafe"):
        ChatText.from_folder(folder).render(messages)


def test_a_template_that_reorders_the_past_raises(folder):
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    conversation = Conversation(OnnxModel(folder))
    conversation.generate("one", Sampling(1))
    before = conversation.context
    with pytest.raises(ExportError, match="does not continue"):
        conversation.generate("two", Sampling(1))
    assert conversation.context == before


def test_without_a_template_prompts_are_plain_text(qwen3, folder):
    (folder / "chat_template.jinja").unlink()
    conversation = Conversation(OnnxModel(folder))
    answer = conversation.generate("abc", Sampling(3))
    ids = qwen3.tokenizer("abc", return_tensors="pt").input_ids
    expected = qwen3.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert list(answer.tokens) == expected[0, 3:].tolist()
    with pytest.raises(ExportError, match="chat template"):
        conversation.generate([{"role": "user", "content": "Hi"}])
