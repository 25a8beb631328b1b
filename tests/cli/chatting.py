"""Chats with the shipped model without a terminal, and their output."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from rich.console import Console

from deltamem_tool.chat.conversation import Conversation, Sampling
from deltamem_tool.chat.repl import Chat
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.memory.shared_file import SharedMemoryFile

TOLD, ASKED, ANSWER = "By the way, my dog is Bella.", "What is the name of my dog?", "Your dog is Bella."
# At this temperature, all tokens are equally likely, so that an answer is long and takes some seconds.
ENDLESS = {"temperature": 1e6, "max_new_tokens": 100_000, "seed": 7}


@pytest.fixture(scope="module")
def engine():
    from deltamem_tool.adapter.load import load
    from deltamem_tool.base_model.tokenizer import tokenizer_of
    from deltamem_tool.chat.torch_engine import TorchModel

    model = load("builtin:adapter")
    return TorchModel(model, tokenizer_of(model))


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Talk:
    """A chat with its outputs."""

    def __init__(self, engine, memory=None, window=None, system=None, memory_file=None, **sampling):
        self.conversation = Conversation(engine, memory, window=window)
        self._out, self._notices = io.StringIO(), io.StringIO()
        consoles = Console(file=self._out, width=80), Console(file=self._notices, width=80)
        file = None if memory_file is None else SharedMemoryFile(memory_file)
        self.chat = Chat(self.conversation, Sampling(**sampling), system, file, *consoles)

    def __call__(self, line):
        """The answer or other output on stdout, and the notices."""
        for file in (self._out, self._notices):
            file.seek(0)
            file.truncate()
        self.chat.handle(line)
        return self._out.getvalue(), self.notices

    @property
    def notices(self) -> str:
        return self._notices.getvalue()


@pytest.fixture
def talk(engine, working_folder):
    return lambda **options: Talk(engine, **options)


def same(one: StoredMemory, other: StoredMemory) -> bool:
    """Bit for bit."""
    return one.states.keys() == other.states.keys() and all(
        np.array_equal(state, other.states[layer]) for layer, state in one.states.items()
    )


def piped(monkeypatch, text: str | bytes) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
