"""The words of natural facts: hundreds of attributes, values and sentences, for any tokenizer.

They are in `assets/facts`. Attributes, values and phrasings (sentences in which a user states, corrects or asks) are
held out separately, by the checksum of their text: one in five never appears in training.
"""

from __future__ import annotations

import itertools
import random
import re
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltamem_tool.io.names import ASSETS

HELD_OUT_SHARE = 5  # one text in five
_FOLDER = ASSETS / "facts"
_SLOT = re.compile(r"{(\w+)}")


@dataclass(frozen=True)
class HeldOut:
    """What is drawn from texts that no training sees; all else is drawn from those that training sees."""

    attributes: bool = False
    values: bool = False
    phrasings: bool = False


NOTHING, EVERYTHING = HeldOut(), HeldOut(attributes=True, values=True, phrasings=True)


def is_held_out(text: str) -> bool:
    """Return whether an attribute, a value or a phrasing is held out from training."""
    return zlib.crc32(text.lower().encode()) % HELD_OUT_SHARE == 0


class Split:
    """Texts for training, and those held out: `split[is_held_out]`."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._parts = {
            held_out: [text for text in texts if is_held_out(text) == held_out] for held_out in (False, True)
        }

    def __getitem__(self, held_out: bool) -> list[str]:
        return self._parts[held_out]


@dataclass(frozen=True, eq=False)
class Kind:
    """Attributes that take values of the same kind.

    Args:
        name: of the kind.
        attributes: all of them.
        values: forms, of which `value` fills the slots.
        asked: the question word.
        is_: what stands between attribute and value.
        is_owned: whether the attributes are somebody's; otherwise they are nobody's ("the back door code").
        clause: which of CLAUSES it is said in.
    """

    name: str
    attributes: Split
    values: tuple[str, ...]
    asked: str
    is_: str
    is_owned: bool
    clause: str

    def value(self, rng: random.Random, held_out: bool) -> str:
        """Draw a value."""
        while True:
            value = _SLOT.sub(lambda slot: rng.choice(PARTS[slot[1]]), rng.choice(self.values))
            if is_held_out(value) == held_out:
                return value


@dataclass(frozen=True)
class Phrases:
    """Sentences of one form of conversation; a slot such as {fact} is filled with a clause."""

    statements: Split
    questions: Split


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((_FOLDER / name).read_text(encoding="utf-8"))


def _part(words: Any) -> tuple[str, ...]:
    """A list of words, or a range of numbers."""
    return tuple(map(str, range(words["from"], words["to"] + 1)) if isinstance(words, dict) else words)


def _fillings(form: str) -> list[str]:
    """Every text that a form stands for."""
    slots = [PARTS[slot] for slot in _SLOT.findall(form)]
    return [_SLOT.sub("{}", form).format(*words) for words in itertools.product(*slots)]


def _kind(kind: Mapping[str, Any]) -> Kind:
    return Kind(
        name=kind["name"],
        attributes=Split([attribute for form in kind["attributes"] for attribute in _fillings(form)]),
        values=tuple(kind["values"]),
        asked=kind["asked"],
        is_=kind.get("is", "is"),
        is_owned=kind.get("whose", "anyone") == "anyone",
        clause=kind.get("clause", "is"),
    )


def _phrases(section: Mapping[str, Any]) -> Phrases:
    return Phrases(Split(section["statements"]), Split(section["questions"]))


def _bare_words() -> list[str]:
    """The word list, without words that sentences are made of: an answer could not be told from them."""
    lines = (_FOLDER / "words.txt").read_text(encoding="utf-8").splitlines()
    spoken = set(re.findall(r"\w+", str(_SENTENCES).lower()))
    return [line for line in lines if not line.startswith("#") and line not in spoken]


PARTS: dict[str, tuple[str, ...]] = {name: _part(words) for name, words in _read("parts.toml").items()}
KINDS = tuple(_kind(kind) for kind in _read("kinds.toml")["kinds"])
NAMES = Split(PARTS["first"])  # of the people whose facts are told
_SENTENCES = _read("sentences.toml")
CLAUSES: dict[str, dict[str, list[str]]] = _SENTENCES["clauses"]
UNTOLD_VALUE: str = _SENTENCES["unknown"]  # in place of a value that was not told
PLAIN, CHAT = _phrases(_SENTENCES["plain"]), _phrases(_SENTENCES["chat"])
CORRECTIONS = Split(_SENTENCES["chat"]["corrections"])
ACKNOWLEDGEMENTS: tuple[str, ...] = tuple(_SENTENCES["chat"]["acknowledgements"])
SYSTEMS: tuple[str, ...] = tuple(_SENTENCES["chat"]["systems"])
SMALL_TALK: tuple[tuple[str, str], ...] = tuple((remark, reply) for remark, reply in _SENTENCES["chat"]["small_talk"])
WORDS = Split(_bare_words())
# Every attribute with its kind: `ATTRIBUTES[is_held_out]`.
ATTRIBUTES = {
    held_out: [(kind, text) for kind in KINDS for text in kind.attributes[held_out]] for held_out in (False, True)
}
