"""Encode episodes as token ids, with labels for the tokens of the answers, which are scored.

Scoring only the answers follows arXiv 2605.12357, section 3.4. An exchange is encoded with nothing in the context
besides the question. If needed, it is also encoded with the turns right before it, or with the whole history. The
scored tokens are the same in all of these views.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from deltamem_tool.base_model.limits import NO_LIMITS, Limits, unknown_token
from deltamem_tool.config import GRANULARITIES
from deltamem_tool.data.episode import Episode
from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.segments.encode import RENDERED, tag_messages
from deltamem_tool.segments.messages import text_of
from deltamem_tool.segments.tags import SegmentTag
from deltamem_tool.segments.template import ChatTemplate, Message

IGNORED = -100  # label of a token that is not scored
VIEWS = ("exchanges", "recent", "full")  # of an `EncodedEpisode`
_AT_ONCE = 64  # episodes that go through the tokenizer together,
_CHARACTERS = 2_000_000  # unless their messages are longer than this


@dataclass(frozen=True)
class EncodedExchange:
    """Token ids and labels, both of length T. A label is the token's id, or IGNORED if the token is not scored."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class EncodedEpisode:
    """An episode as token ids.

    Args:
        write_ids: the history, cut from the left; W tokens.
        tags: segment tag of each of these tokens, as in `tag_chat`.
        exchanges: exchanges that are read with the memory alone.
        recent: the same exchanges after the last turns of the history; empty unless asked for.
        full: the same exchanges after the whole history, cut from the left; empty unless asked for.
        where: file and line.
        cut: number of tokens that were cut from the history.
    """

    write_ids: list[int]
    tags: list[int]
    exchanges: list[EncodedExchange]
    recent: list[EncodedExchange]
    full: list[EncodedExchange]
    where: str = ""
    cut: int = 0


class _RenderedExchange(NamedTuple):
    """A rendered exchange: `text` is `prompt` and the answer."""

    prompt: str
    text: str


# Encoding one episode gives texts and gets their tokens, so that those of many episodes are tokenised together.
_Steps = Generator[list[str], list[Any], EncodedEpisode]


class Encoder:
    """Episodes become `EncodedEpisode`s.

    Args:
        tokenizer: a fast one with a chat template.
        max_write_tokens: histories are cut from the left to this length, or to the model's positions.
        max_read_tokens: exchanges longer than this, or than the model's positions, are an error.
        granularity: what the memory writes at once, as in `DeltaMemConfig`.
        recent_turns: `recent` shows up to so many turns of the history, as many as fit max_read_tokens with the
            exchange. A turn goes from a user's message up to the next.
        full_context: make `full`, cut to max_write_tokens + max_read_tokens, or to the model's positions.
        limits: of the model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_write_tokens: int,
        max_read_tokens: int,
        granularity: str = "token",
        recent_turns: int = 0,
        full_context: bool = False,
        limits: Limits = NO_LIMITS,
    ) -> None:
        self._template = ChatTemplate.from_tokenizer(tokenizer)
        if not tokenizer.is_fast:
            raise DataError(
                f"The tokenizer {self._template.name} does not give the positions of tokens in the text.",
                f"{type(tokenizer).__name__} is a slow tokenizer.",
                "Use a fast tokenizer.",
            )
        if granularity not in GRANULARITIES:
            raise ConfigError(f"Unknown granularity {granularity!r}.", f"It is one of {', '.join(GRANULARITIES)}.")
        self.tokenizer = tokenizer
        self.max_write_tokens, self.max_read_tokens, self.max_full_tokens = (
            most if limits.positions is None else min(most, limits.positions)
            for most in (max_write_tokens, max_read_tokens, max_write_tokens + max_read_tokens)
        )
        self.granularity, self.recent_turns, self.full_context = granularity, recent_turns, full_context
        self.limits = limits

    @property
    def pad(self) -> int:
        """Token id that pads batches; a mask hides it."""
        tokens = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        most = self.limits.vocabulary or math.inf
        return next((token for token in tokens if token is not None and token < most), 0)

    def takes_system(self, prompt: str) -> bool:
        """Whether the chat template writes a conversation that begins with such a system prompt."""
        talk = [{"role": role, "content": content} for role, content in (("system", prompt), ("user", "Hello."))]
        return self._template.try_render(talk) is not None

    def options(self) -> dict[str, Any]:
        """Return all options that determine the encoding besides the tokenizer."""
        names = ("max_write_tokens", "max_read_tokens", "granularity", "recent_turns", "full_context", "limits")
        return {name: getattr(self, name) for name in names}

    def __call__(self, episodes: Sequence[Episode]) -> list[EncodedEpisode]:
        """Encode all episodes.

        Raises:
            DataError: an episode cannot be encoded; the error names the first one by its `where`.
        """
        encoded = []
        for each in self.encode_each(episodes):
            if isinstance(each, DataError):
                raise each
            encoded.append(each)
        return encoded

    def encode_each(self, episodes: Sequence[Episode]) -> Iterator[EncodedEpisode | DataError]:
        """Yield each episode as it is encoded, or why it cannot be."""
        for together in _batches(episodes):
            yield from self._encode_batch(together)

    def exchanges(self, conversations: Sequence[tuple[str, list[Message]]]) -> list[EncodedExchange]:
        """Encode conversations, each with its place, that no history comes before: the last message is the answer.

        Raises:
            DataError: one cannot be encoded; the error names it by its place.
        """
        encoded = []
        for where, messages in conversations:
            try:
                rendered = _render_exchange(self._template, messages)
                (encoding,) = self._tokenise([rendered.text])
                exchange = _label(rendered, encoding)
                self._check_length(exchange, rendered.text)
                self._check_ids(exchange.ids)
            except DataError as error:
                raise DataError(f"{where}: {error.what}", error.why, error.next) from error
            encoded.append(exchange)
        return encoded

    def _encode_batch(self, episodes: Sequence[Episode]) -> list[EncodedEpisode | DataError]:
        steps = [self._encoding_steps(episode) for episode in episodes]
        done: dict[int, EncodedEpisode | DataError] = {}
        tokenised: dict[int, Any] = dict.fromkeys(range(len(episodes)))
        while tokenised:
            rendered: dict[int, list[str]] = {}
            for n, tokens in tokenised.items():
                try:
                    rendered[n] = steps[n].send(tokens)
                except StopIteration as end:
                    done[n] = end.value
                except DataError as error:
                    at = f"{episodes[n].where}: " if episodes[n].where else ""
                    done[n] = refusal = DataError(f"{at}{error.what}", error.why, error.next)
                    refusal.__cause__ = error
            encodings = iter(self._tokenise([text for texts in rendered.values() for text in texts]))
            tokenised = {n: [next(encodings) for _ in texts] for n, texts in rendered.items()}
        return [done[n] for n in range(len(episodes))]

    def _tokenise(self, texts: list[str]) -> list[Any]:
        """Return the encoding of each text, as an object of the tokenizers library."""
        if not texts:
            return []
        encodings: list[Any] = self.tokenizer(texts, **RENDERED).encodings
        return encodings

    def _encoding_steps(self, episode: Episode) -> _Steps:
        if not episode.history:
            raise DataError("The episode has no history.", "", "Give it at least one message to remember.")
        template = self._template.with_kwargs(episode.template_kwargs)
        if self.granularity == "token":
            (history,) = yield [template.render(episode.history)]
            ids = history.ids
            tags: list[int] = [SegmentTag.LAST] * len(ids)
        else:
            _, ids, tags = tag_messages(self.tokenizer, template, episode.history, self.granularity)
        kept = slice(max(0, len(ids) - self.max_write_tokens), None)
        rendered = [_render_exchange(template, exchange) for exchange in episode.exchanges]
        exchanges = yield from self._encode_exchanges(rendered)
        for exchange, (_, text) in zip(exchanges, rendered, strict=True):
            self._check_length(exchange, text)
        recent = (yield from self._recent(episode, exchanges)) if self.recent_turns else []
        full = (yield from self._full(episode)) if self.full_context else []
        for view in filter(None, (recent, full)):
            for alone, shown in zip(exchanges, view, strict=True):
                _check_same(alone, shown)
        for text in (ids[kept], *(exchange.ids for exchange in (*exchanges, *recent, *full))):
            self._check_ids(text)
        return EncodedEpisode(ids[kept], tags[kept], exchanges, recent, full, episode.where, kept.start)

    def _encode_exchanges(
        self, rendered: list[_RenderedExchange]
    ) -> Generator[list[str], list[Any], list[EncodedExchange]]:
        encodings = yield [text for _, text in rendered]
        return list(map(_label, rendered, encodings))

    def _recent(
        self, episode: Episode, alone: list[EncodedExchange]
    ) -> Generator[list[str], list[Any], list[EncodedExchange]]:
        """Encode each exchange with as many of the allowed turns before it as fit."""
        _, history = _split(episode.history)
        starts = [n for n, message in enumerate(history) if message["role"] == "user"][-self.recent_turns :]
        chosen, template = list(alone), self._template.with_kwargs(episode.template_kwargs)
        waiting = list(range(len(alone)))
        for start in starts:
            if not waiting:
                break
            views = []
            for n in waiting:
                system, turns = _split(episode.exchanges[n])
                views.append(_render_exchange(template, [*system, *history[start:], *turns]))
            shown = yield from self._encode_exchanges(views)
            for n, exchange in zip(list(waiting), shown, strict=True):
                if len(exchange.ids) <= self.max_read_tokens:
                    chosen[n] = exchange
                    waiting.remove(n)
        return chosen

    def _full(self, episode: Episode) -> Generator[list[str], list[Any], list[EncodedExchange]]:
        before, history = _split(episode.history)
        views, template = [], self._template.with_kwargs(episode.template_kwargs)
        for exchange in episode.exchanges:
            system, turns = _split(exchange)
            views.append(_render_exchange(template, [*(system or before), *history, *turns]))
        shown = yield from self._encode_exchanges(views)
        kept = slice(-self.max_full_tokens, None)
        return [EncodedExchange(exchange.ids[kept], exchange.labels[kept]) for exchange in shown]

    def _check_ids(self, ids: list[int]) -> None:
        largest, vocabulary = max(ids, default=0), self.limits.vocabulary
        if vocabulary is not None and largest >= vocabulary:
            raise unknown_token(self.tokenizer.convert_ids_to_tokens(largest), largest, vocabulary)

    def _check_length(self, exchange: EncodedExchange, text: str) -> None:
        if len(exchange.ids) > self.max_read_tokens:
            by_model = self.max_read_tokens == self.limits.positions
            most = "the model's positions" if by_model else f"max_read_tokens = {self.max_read_tokens}"
            raise DataError(
                f"An exchange has {len(exchange.ids)} tokens, more than {most}.",
                f"It begins: {text[:80]!r}.",
                f"Shorten it to {self.max_read_tokens} tokens."
                if by_model
                else "Raise max_read_tokens in the recipe, or shorten the answer.",
            )
        if all(label == IGNORED for label in exchange.labels[1:]):
            raise DataError(
                "The answer has no token that could be scored.",
                "The chat template writes nothing for it, or its characters are in tokens of the prompt.",
                "Leave it out, or use another tokenizer.",
            )


def _render_exchange(template: ChatTemplate, exchange: list[Message]) -> _RenderedExchange:
    prompt, answer = template.exchange(exchange)
    return _RenderedExchange(prompt, prompt + answer)


def _label(rendered: _RenderedExchange, encoding: Any) -> EncodedExchange:
    labels = [
        token if start >= len(rendered.prompt) else IGNORED
        for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
    ]
    return EncodedExchange(encoding.ids, labels)


def _batches(episodes: Sequence[Episode]) -> Iterator[list[Episode]]:
    """Yield groups of episodes that can be tokenised together in little memory."""
    part: list[Episode] = []
    length = 0
    for episode in episodes:
        part.append(episode)
        length += sum(len(text_of(message)) for message in episode.history)
        if len(part) == _AT_ONCE or length > _CHARACTERS:
            yield part
            part, length = [], 0
    if part:
        yield part


def _split(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Split messages into the system prompt, if there is one, and the rest."""
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    return system, messages[len(system) :]


def _check_same(alone: EncodedExchange, shown: EncodedExchange) -> None:
    tokens = [[label for label in exchange.labels[1:] if label != IGNORED] for exchange in (alone, shown)]
    if tokens[0] != tokens[1]:
        raise DataError(
            "The answer has different tokens with the history in view than without it.",
            f"Without the history it begins with {tokens[0][:8]}, with it {tokens[1][:8]}.",
            "Use a tokenizer whose template writes an answer the same way after any history.",
        )
