"""Conversations in the format of the chat completions API."""

from __future__ import annotations

SYSTEM = {"role": "system", "content": "be brief"}


def talk(*texts, system=()):
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    return [*system, *({"role": roles[n % 2], "content": text} for n, text in enumerate(texts))]
