"""Reading the tokenizer of a checkpoint."""

from __future__ import annotations

from helpers.tiny import CHAT_TEMPLATE, tiny_tokenizer

from deltamem_tool.base_model.tokenizer import read_tokenizer


def test_a_byte_order_mark_is_removed_from_the_template(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8-sig")
    assert read_tokenizer(tmp_path).chat_template == CHAT_TEMPLATE
