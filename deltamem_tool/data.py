"""Conversations become training episodes: what is written, and what is then asked with nothing but the memory.

An episode (arXiv 2605.12357, section 3.4): the write pass sees the history, the read pass a question and its answer,
and only the answer is scored.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from deltamem_tool import dialogues
from deltamem_tool.chat_template import render
from deltamem_tool.dialogues import Message
from deltamem_tool.errors import DataError
from deltamem_tool.memory import OUTSIDE
from deltamem_tool.segments import Marked, mark_chat, padded

IGNORED = -100  # label of a token that is not scored
ASKED = 0.15  # generated histories hold questions too, so that the memory learns not to write them
_CHECKED = 256  # episodes that are checked at once
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Episode:
    """A history, and exchanges about it. Each exchange is a prompt and the assistant's answer, its last message."""

    history: list[Message]
    exchanges: list[list[Message]]
    where: str = field(default="", compare=False)  # file and line that it was read from


class ChatEpisodes(Dataset[Episode]):
    """JSONL with one conversation a line, `{"messages": [{"role", "content"}, …]}`, ending with an assistant's message.

    The history is the system prompt and all turns but the last; the exchange is the system prompt and the last turn.

    Raises:
        DataError: a line is not such a conversation; the error names file and line.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise DataError(f"There is no data file {path}.", "", "Correct the path in the recipe.")
        try:
            lines = (
                path.read_bytes().decode().split("\n")
            )  # splitlines() would cut at U+2028, which JSON allows in text
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8.", f"{error}.", "Save the file as UTF-8.") from error
        self.episodes = [_episode(line, f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]
        if not self.episodes:
            raise DataError(f"{path} holds no conversation.", "It is empty.", "Use another file.")

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> Episode:
        return self.episodes[index]


class DialogueEpisodes(Dataset[Episode]):
    """Generated dialogues (`dialogues.py`): facts told, then every one of them asked for by itself.

    The number of facts grows over training: at episode i of n it is drawn up to a ceiling that rises from
    `facts_first` to `facts_last` within the first `growth` of all episodes, and down to 1, or to that ceiling times
    `fewest`. A batch has one number, so that its episodes are of like length. With probability `replies` an episode
    also holds a statement or a remark and its reply, so that with a memory the model still does what it did without.
    Episode i depends on `seed` and i alone.
    """

    def __init__(
        self,
        episodes: int,
        batch_size: int,
        seed: int,
        facts_first: int,
        facts_last: int,
        growth: float,
        fewest: float = 0.0,
        replies: float = 0.0,
    ) -> None:
        self.episodes, self.batch_size, self.seed, self.growth = episodes, batch_size, seed, growth
        self.facts_first, self.facts_last = facts_first, facts_last
        self.fewest, self.replies = fewest, replies

    def __len__(self) -> int:
        return self.episodes

    def __getitem__(self, index: int) -> Episode:
        if not 0 <= index < self.episodes:
            raise IndexError(index)
        rng = random.Random(f"{self.seed}/{index}")
        start = index - index % self.batch_size
        grown = min(1.0, start / max(1.0, self.growth * self.episodes))
        ceiling = self.facts_first + grown * (self.facts_last - self.facts_first)
        of_batch = random.Random(f"{self.seed}/batch {index // self.batch_size}")
        most = int(ceiling) + (of_batch.random() < ceiling % 1)
        count = of_batch.randint(max(1, math.ceil(self.fewest * most)), most)
        facts = dialogues.sample_facts(rng, count, held_out=False)
        history = dialogues.telling(rng, facts, held_out=False, asked=ASKED)
        exchanges = [dialogues.asking(rng, fact) for fact in facts]
        if self.replies and rng.random() < self.replies:
            exchanges.append(dialogues.telling(rng, dialogues.sample_facts(rng, 1, held_out=False), held_out=False)[:2])
        return Episode(history, exchanges)


class EpisodeCollator:
    """Episodes become the tensors of one training step.

    Returns a dictionary: `write_ids`, `write_mask` `[B, W]`, and `write_segments` `[B, W]` where the memory writes by
    segments; `read_ids`, `read_mask`, `labels` `[Q, T]` over all exchanges of the batch; `rows` `[Q]`, the conversation
    of each exchange.

    Args:
        tokenizer: with a chat template.
        max_write_tokens: histories are cut from the left to this length.
        max_read_tokens: exchanges longer than this are an error.
        granularity: what the memory writes at once, as in `DeltaMemConfig`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_write_tokens: int,
        max_read_tokens: int,
        granularity: str = "token",
    ) -> None:
        if tokenizer.chat_template is None:
            raise DataError("The tokenizer has no chat template.", "", "Use the base model's chat or instruct version.")
        self.tokenizer = tokenizer
        self.max_write_tokens, self.max_read_tokens = max_write_tokens, max_read_tokens
        self.granularity = granularity

    def __call__(self, episodes: Sequence[Episode]) -> dict[str, Tensor]:
        histories = [self._history(episode) for episode in episodes]
        written = [history.input_ids[-self.max_write_tokens :] for history in histories]
        rows = [row for row, episode in enumerate(episodes) for _ in episode.exchanges]
        read, labels = self._exchanges(episodes)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        marks = [history.marks[-self.max_write_tokens :] for history in histories]
        segments = {} if self.granularity == "token" else {"write_segments": padded(marks, OUTSIDE)}
        return {
            **segments,
            "write_ids": padded(written, pad),
            "write_mask": padded([[1] * len(ids) for ids in written], 0),
            "read_ids": padded(read, pad),
            "read_mask": padded([[1] * len(ids) for ids in read], 0),
            "labels": padded(labels, IGNORED),
            "rows": torch.tensor(rows),
        }

    def check(self, episodes: Sequence[Episode]) -> None:
        """Find out before a training run, rather than in it, whether all `episodes` can be taken.

        Raises:
            DataError: an exchange is too long, or the template cannot render it; the error names file and line.
        """
        for start in range(0, len(episodes), _CHECKED):
            some = episodes[start : start + _CHECKED]
            for episode in some:
                self._history(episode)
            self._exchanges(some)

    def _history(self, episode: Episode) -> Marked:
        try:
            return mark_chat(self.tokenizer, episode.history, self.granularity)
        except DataError as error:
            raise DataError(f"{_at(episode.where)}{error.what}", error.why, error.next) from error

    def _exchanges(self, episodes: Sequence[Episode]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids and labels of all exchanges, not padded."""
        exchanges = [(exchange, episode.where) for episode in episodes for exchange in episode.exchanges]
        prompts = [_rendered(self.tokenizer, exchange[:-1], where, True) for exchange, where in exchanges]
        texts = [_rendered(self.tokenizer, exchange, where) for exchange, where in exchanges]
        encoded = self._tokenise(texts, return_offsets_mapping=True)
        read, labels = [], []
        for prompt, text, ids, offsets, (_, where) in zip(
            prompts, texts, encoded["input_ids"], encoded["offset_mapping"], exchanges, strict=True
        ):
            if not text.startswith(prompt):
                raise DataError(
                    f"{_at(where)}The chat template renders the prompt differently once the answer follows.",
                    f"Prompt: {prompt[-80:]!r}; with the answer: {text[:80]!r}….",
                    "Use a tokenizer whose template only appends.",
                )
            if len(ids) > self.max_read_tokens:
                raise DataError(
                    f"{_at(where)}An exchange has {len(ids)} tokens, more than max_read_tokens = "
                    f"{self.max_read_tokens}.",
                    f"It begins: {text[:80]!r}.",
                    "Raise max_read_tokens in the recipe, or shorten the answer.",
                )
            read.append(ids)
            labels.append([i if start >= len(prompt) else IGNORED for i, (start, _) in zip(ids, offsets, strict=True)])
        return read, labels

    def _tokenise(self, texts: list[str], **options: Any) -> Any:
        # The template has written every special token that belongs here.
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, **options)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, prompt: bool = False) -> str:
    """`render`, where the messages are a user's and the template may refuse them."""
    try:
        return render(tokenizer, messages, generation_prompt=prompt)
    except TemplateError as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{_at(where)}The chat template refuses the conversation.", f"{why}.", "Change the conversation."
        ) from error


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _episode(line: str, where: str) -> Episode:
    try:
        said = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON.", f"{error}.", "Correct the line: one JSON object a line.") from error
    messages = said.get("messages") if isinstance(said, dict) else None
    if not isinstance(messages, list):
        raise DataError(f"{where} is no conversation.", "It has no list `messages`.", "Correct the line.")
    for n, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(
                f"{where}: message {n} has no role.", f"The roles are {', '.join(ROLES)}.", "Add it to the message."
            )
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}: message {n} has no text.", "`content` is not a string.", "Correct the message.")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{where} asks nothing.", "It does not end with an assistant's message.", "Correct the line.")
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    last = max((n for n, message in enumerate(turns) if message["role"] == "user"), default=0)
    if last == 0:
        raise DataError(
            f"{where} has no history.", "There is nothing before its last turn.", "Use longer conversations."
        )
    return Episode(system + turns[:last], [system + turns[last:]], where)
