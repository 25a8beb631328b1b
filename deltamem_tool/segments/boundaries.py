"""Assign the tokens of a chat to segments: the tags that sequence-state write needs.

A segment is a chat message with its role header and template tail, or a sentence of it. Boundaries are character
positions in the rendered text, and are found for any chat template: message i ends where the rendering of messages 0 to
i ends. Some templates render a turn differently once others follow it, or cannot render a conversation that stops
there. Then the next message starts one literal role header before its content. If that position cannot be found either,
the conversation is rejected. No text is searched for among the tokens.

* System messages belong to no segment. Neither does text that the template writes before the first message (a begin
  token, a default system prompt), if it can be told from that message's header. If the template puts the system text
  into a user message (Gemma, Mistral), it belongs to that message.
* The generation prompt opens a segment that does not end yet. The generated tokens join it.
* A token belongs to the segment of its first character that is not whitespace: " It" starts a sentence instead of
  ending the previous one. A token of only whitespace belongs to the segment of its first character.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import sentencex

from deltamem_tool.errors import DataError
from deltamem_tool.segments.tags import SegmentTag
from deltamem_tool.segments.template import ChatTemplate, Message

Split = Callable[[str], Sequence[str]]

WITHOUT_TAGS = 'Or use granularity "token", which needs no boundaries.'


class Span(NamedTuple):
    """Characters from the end of the span before this one up to `end`."""

    end: int
    belongs: bool  # to a segment
    segment: str = ""  # the segment's name in errors, if it ends here


def spans_of(
    template: ChatTemplate, messages: Sequence[Message], text: str, generation_prompt: bool, split: Split | None
) -> list[Span]:
    """Split a rendering into spans, in order and without gaps.

    Args:
        template: of the tokenizer.
        messages: the conversation.
        text: its rendering.
        generation_prompt: whether the rendering ends with a generation prompt.
        split: function that splits into sentences, as in `segments.encode.tag_chat`; None keeps messages whole.

    Raises:
        DataError: as in `segments.encode.tag_chat`.
    """
    body = template.render(messages) if generation_prompt else text
    if not text.startswith(body):
        raise DataError(
            f"The chat template of {template.name} renders the messages differently before a generation prompt.",
            f"Without: {body[-80:]!r}; with: {text[-80:]!r}.",
            f"Leave the generation prompt out. {WITHOUT_TAGS}",
        )
    bounds = _bounds(template, messages, body)
    spans = [Span(bounds[0], belongs=False)]
    for index, message in enumerate(messages):
        start, end = bounds[index : index + 2]
        name = _name(messages, index)
        content = message.get("content")
        if message["role"] == "system":
            spans.append(Span(end, belongs=False))
        elif split is None or not isinstance(content, str) or not content.strip():
            spans.append(Span(end, True, name))
        else:
            begin, written = _written_content(template, messages, index, body, start, end)
            starts = [begin + at for at in _sentence_starts(written, split, name)] if written.strip() else [begin]
            for first, following in zip(starts, [*starts[1:], end], strict=True):
                spans.append(Span(following, True, f"Sentence {body[first:following].strip()[:60]!r} of {name}"))
    spans.append(Span(len(text), belongs=True))  # the generation prompt, if any: a segment that stays open
    return spans


def _bounds(template: ChatTemplate, messages: Sequence[Message], body: str) -> list[int]:
    """Return where each message starts in `body` and where the last one ends: one number more than messages."""
    first = None if messages[0]["role"] == "system" else template.preamble(messages[0], body)
    bounds = [first or 0]
    for index in range(1, len(messages)):
        bound = _bound(template, messages, index, body)
        if bound is None or bound < bounds[-1]:
            raise DataError(
                f"The chat template of {template.name} does not show where {_name(messages, index - 1)} ends and "
                f"{_name(messages, index)} starts.",
                "It renders earlier messages differently when later ones follow, or not at all without them, and no "
                f"known header of the role {messages[index]['role']} precedes the later message's content.",
                f"Use a tokenizer whose template only appends messages. {WITHOUT_TAGS}",
            )
        bounds.append(bound)
    return [*bounds, len(body)]


def _bound(template: ChatTemplate, messages: Sequence[Message], index: int, body: str) -> int | None:
    """Return where message `index` starts and the one before it ends; None if the template does not show it."""
    earlier = template.try_render(messages[:index])
    if earlier is not None and body.startswith(earlier):
        return len(earlier)
    message = messages[index]
    place = template.content(messages, index, body)
    header = None if place is None else template.header(message, place.before)
    if place is not None and header is not None:
        return len(place.before) - len(header)
    if all(other["role"] == "system" for other in messages[:index]):
        return template.preamble(message, body)  # their text is within this message
    return None


def _written_content(
    template: ChatTemplate, messages: Sequence[Message], index: int, body: str, start: int, end: int
) -> tuple[int, str]:
    """Return where the content of the message in `body[start:end]` begins, and the content as rendered."""
    place = template.content(messages, index, body)
    if place is not None and body.endswith(place.after):
        begin, stop = len(place.before), len(body) - len(place.after)
        if start <= begin <= stop <= end and body[begin:stop] in messages[index]["content"]:
            return begin, body[begin:stop]
    raise DataError(
        f"The chat template of {template.name} does not show where the content of {_name(messages, index)} is.",
        "The template changes the content, or what it writes around the content depends on it.",
        'Use granularity "message".',
    )


def english(text: str) -> list[str]:
    """Split English text into sentences."""
    sentences: list[str] = sentencex.segment("en", text)
    return sentences


def _sentence_starts(content: str, split: Split, name: str) -> list[int]:
    """Return where the sentences of `content`, which is not blank, start. `name` is the message's name."""
    starts, position = [], 0
    pieces = split(content)
    if isinstance(pieces, str):
        raise DataError(
            f"The split of {name} is a string, not a list.", f"It is {pieces[:60]!r}.", "Return a list of sentences."
        )
    for piece in pieces:
        at = content.find(piece, position) if isinstance(piece, str) and piece else -1
        if at < 0:
            raise DataError(
                f"The split of {name} has the piece {piece!r}, which is not in the rest of the content.",
                f"The rest begins: {content[position : position + 60]!r}.",
                "Return pieces of the text in order, none of them empty.",
            )
        if not piece.isspace():
            starts.append(at)
        position = at + len(piece)
    if not starts:
        raise DataError(
            f"The split of {name} finds no sentence.", f"The content is {content[:60]!r}.", "Return at least one piece."
        )
    return starts


def tags_of(text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[int]:
    """Return the tags of tokens with the character ranges `offsets`; byte-level tokens can share a character.

    Raises:
        DataError: tokens are not in the order of the text, or a segment has no token of its own.
    """
    owners = owners_of(text, offsets, spans)
    if owners != sorted(owners):
        raise DataError(
            "The tokens are not in the order of the text.", "", f"Use a tokenizer that keeps the order. {WITHOUT_TAGS}"
        )
    tags: list[int] = [SegmentTag.INSIDE if spans[owner].belongs else SegmentTag.OUTSIDE for owner in owners]
    for index, span in enumerate(spans):
        if not span.segment:
            continue
        last = bisect_right(owners, index) - 1
        if last < 0 or owners[last] != index:
            raise DataError(
                f"{span.segment[0].upper()}{span.segment[1:]} has no token of its own.",
                "The template writes nothing for it, or its characters are in tokens of the text before or after it.",
                "Leave it out, or merge it with another.",
            )
        tags[last] = SegmentTag.LAST
    return tags


def owners_of(text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[int]:
    """Return the index of the span that each token belongs to."""
    ends = [span.end for span in spans]
    return [bisect_right(ends, _place(text, start, end)) for start, end in offsets]


def _place(text: str, start: int, end: int) -> int:
    """Return the position of the character that decides the segment of the token at `text[start:end]`."""
    characters = text[start:end]
    if characters.strip():
        return end - len(characters.lstrip())
    if start == end and start > 0 and text[start - 1].isspace():
        return start - 1  # a token of spaces, from a tokenizer that leaves them out of its offsets
    return min(start, len(text) - 1)


def _name(messages: Sequence[Message], index: int) -> str:
    return f"message {index + 1} ({messages[index]['role']})"
