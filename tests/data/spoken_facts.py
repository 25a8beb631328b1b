"""Parse generated conversations: who states what about whom, from the sentences alone."""

from __future__ import annotations

import re
from typing import NamedTuple

from deltamem_tool.data.fact_words import CHAT, CORRECTIONS, KINDS, PLAIN, UNTOLD_VALUE

IS = {text: kind for kind in KINDS if kind.clause == "is" for held in (False, True) for text in kind.attributes[held]}
PREFERRED = {
    text: kind for kind in KINDS if kind.clause == "prefers" for held in (False, True) for text in kind.attributes[held]
}


class Spoken(NamedTuple):
    """A fact as it was said. Questions, and answers that leave it open, have no value."""

    owner: str  # "my", "the", "Anna"
    attribute: str
    value: str | None
    frame: str


def both(split):
    return [*split[False], *split[True]]


def _frames(texts):
    """(frame, what is before its slot, the slot, what is behind it); the longest first, since others fit it too."""
    longest = sorted(dict.fromkeys(texts), key=len, reverse=True)
    return [(text, *re.fullmatch(r"(.*)\{(\w+)\}(.*)", text).groups()) for text in longest]


STATEMENTS = _frames([*both(PLAIN.statements), *both(CHAT.statements), *both(CORRECTIONS)])
QUESTIONS = _frames([*both(PLAIN.questions), *both(CHAT.questions)])
ANSWERS = _frames(["{Answer}."])


def statements_in(text):
    """All facts that a message states, in order; None if it does not consist of statements."""
    for end in [*(match.start() + 1 for match in re.finditer(r"[.!?] ", text)), len(text)]:
        for spoken in _read(text[:end], STATEMENTS, _fact):
            rest = [] if end == len(text) else statements_in(text[end + 1 :])
            if rest is not None:
                return [spoken, *rest]
    return None


def question_in(text):
    return next(_read(text, QUESTIONS, lambda words: _open(words.rstrip("?"))), None)


def answer_in(text):
    """The fact that an answer states, or that it does not know."""
    return next(_read(text, ANSWERS, lambda words: _unknown(words) or _fact(words)), None)


def _read(text, frames, meaning):
    for frame, before, slot, after in frames:
        if text.startswith(before) and text.endswith(after) and len(before) + len(after) < len(text):
            words = text[len(before) : len(text) - len(after)]
            if slot[0].isupper():
                first = words.split()[0]
                words = words if first == "I" or _is_name(first) else words[0].lower() + words[1:]
            meant = meaning(words)
            if meant is not None:
                yield Spoken(*meant, frame)


def _is_name(word):
    return word.removesuffix("'s") not in ("My", "Your", "The", "You", "For", "What", "Who", "When", "Where", "How")


def _owner(word):
    mine = {"your": "my", "I": "my", "you": "my"}
    return mine.get(word, word.removesuffix("'s"))


def _fact(words):
    possessive, _, rest = words.partition(" ")
    for match in re.finditer(r" is ", rest):
        kind = IS.get(rest[: match.start()])
        is_ = None if kind is None else f" {kind.is_} "
        if is_ and rest[match.start() :].startswith(is_):
            return _owner(possessive), rest[: match.start()], rest[match.start() + len(is_) :]
    verbs = r"(?:prefers?|likes?|would choose|always wants?)"
    for form in (
        rf"for (?P<a>[^,]+), (?P<s>\w+) {verbs} (?P<v>.+)",
        rf"(?P<s>\w+) {verbs} (?P<v>.+?)(?: best)? for (?P<a>.+)",
    ):
        match = re.fullmatch(form, words)
        if match and match["a"] in PREFERRED:
            return _owner(match["s"]), match["a"], match["v"]
    return None


def _unknown(words):
    for form in (rf"(?P<s>\S+) (?P<a>.+) is {UNTOLD_VALUE}", rf"for (?P<a>[^,]+), (?P<s>\w+) prefers? {UNTOLD_VALUE}"):
        match = re.fullmatch(form, words)
        if match and match["a"] in {**IS, **PREFERRED}:
            return _owner(match["s"]), match["a"], None
    return None


def _open(words):
    """A question, direct or indirect."""
    question_word = r"(?:who|what time|what|when|where|how much)"
    for form in (rf"{question_word} is (\S+) (.+)", rf"{question_word} (\S+) (.+) is"):
        match = re.fullmatch(form, words)
        if match and match[2] in IS:
            return _owner(match[1]), match[2], None
    for form in (
        r"what does? (?P<s>\w+) prefer for (?P<a>.+)",
        r"for (?P<a>[^,]+), what (?:do|does) (?P<s>\w+) prefer",
        r"what (?:do|does) (?P<s>\w+) prefer for (?P<a>.+)",
        r"what (?P<s>\w+) prefers? for (?P<a>.+)",
    ):
        match = re.fullmatch(form, words)
        if match and match["a"] in PREFERRED:
            return _owner(match["s"]), match["a"], None
    return None
