"""Tiny models, and the contents of a conversation, for the tests of this folder."""

from __future__ import annotations

import numpy as np
import torch
from helpers.greedy import continue_greedily
from helpers.tiny import PAD, randomise, tiny_model, tiny_tokenizer

from deltamem_tool import DeltaMemConfig, MemoryCache, attach
from deltamem_tool.chat.conversation import Conversation, Sampling
from deltamem_tool.chat.torch_engine import TorchModel

TOLERANCE = 1e-5  # of logits and states
TURNS = ("my cat is Bella", "what is the name of my cat?", "thank you")
SYSTEM = {"role": "system", "content": "be brief"}
OTHERS = ("hello there", "no", "the name of my dog is Max, and that of my cat is Tom")


def make_engine(stop_tokens: frozenset[int] = frozenset(), name: str = "qwen3", **changes) -> TorchModel:
    tokenizer = tiny_tokenizer()
    model = tiny_model(name, vocab_size=len(tokenizer), **changes)
    randomise(attach(model, DeltaMemConfig(rank=4, state_heads=2, branches=("q", "v", "o"))))
    engine = TorchModel(model, tokenizer)
    engine.stop_tokens = stop_tokens
    return engine


def say(conversation: Conversation, *contents, tokens: int = 6, **options) -> list[tuple[int, ...]]:
    return [conversation.generate(content, Sampling(tokens, **options)).tokens for content in contents]


def assert_same_memory(actual, expected, tolerance: float = 0.0) -> None:
    assert actual.states.keys() == expected.states.keys() and actual.adapter == expected.adapter
    for layer, state in actual.states.items():
        np.testing.assert_allclose(state, expected.states[layer], rtol=0, atol=tolerance)


def state_of(conversation: Conversation):
    return conversation.context, conversation.messages, conversation.memory


def assert_unchanged(conversation: Conversation, before) -> None:
    context, messages, memory = before
    assert conversation.context == context and conversation.messages == messages
    assert_same_memory(conversation.memory, memory)


def in_generate(engine: TorchModel, turns, new_tokens: int):
    """Tokens of each answer and the memory, by `model.generate` on one cache."""
    cache, ids, answers = MemoryCache(engine.model), torch.zeros(1, 0, dtype=torch.long), []
    for turn in turns:
        text = ("<|end|>" if answers else "") + f"<|user|>{turn}<|end|><|assistant|>"
        new = torch.tensor([engine.text.encode(text)])
        ids = torch.cat([ids, new], dim=1)
        prompt = ids.shape[1]
        ids = continue_greedily(engine.model, ids, cache, new_tokens, PAD)
        answers.append(tuple(ids[0, prompt:].tolist()))
    return answers, cache.memory


def plain(engine: TorchModel) -> TorchModel:
    """An engine without a chat template, so that an empty text has no tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    model = TorchModel(engine.model, tokenizer)
    model.stop_tokens = frozenset()
    return model
