"""Track which messages a memory has been fed, so that clients can resend a conversation and nothing is written twice.

Only digests of messages are kept, salted for each memory. A request is compared with the conversations that the memory
knows. It may begin like one of them, or in the middle of one, if the client has dropped the oldest messages.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltamem_tool.segments.messages import Message, text_of

MAX_DIGESTS = 512  # of messages in all conversations; the oldest conversations are forgotten
MAX_SYSTEM = 16  # digests of system messages
MAX_KEYS = 32  # digests of idempotency keys
DIGEST_BYTES = 9  # two digests are equal by chance once in 4e21 pairs
SALT_BYTES = 16
SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class Talk:
    """A conversation that was fed.

    Args:
        digests: digests of its messages, without system messages; the last one is that of an answer.
        pending: number of tokens of that answer that were not fed.
    """

    digests: tuple[str, ...]
    pending: int = 0


@dataclass(frozen=True)
class KnownMessages:
    """The part of a request that was fed before.

    Args:
        messages: for each message, whether it was fed.
        talk: index of the conversation that the request continues; None for a new one.
        is_complete: whether the request contains all of that conversation.
        is_latest: whether that conversation is the last one that was fed, and `is_complete`.
    """

    messages: tuple[bool, ...]
    talk: int | None = None
    is_complete: bool = False
    is_latest: bool = False

    @property
    def is_retry(self) -> bool:
        """Whether no message is new: the client retries the request, or wants another answer."""
        return all(self.messages)


@dataclass(frozen=True)
class MessageHistory:
    """The conversations that a memory has been fed. It is never changed: `with_turn` returns a new one.

    Args:
        salt: salt of the digests.
        talks: conversations, the most recently fed one last.
        system: digests of system messages.
        keys: digests of the requests' idempotency keys, the most recent one last.
    """

    salt: str
    talks: tuple[Talk, ...] = ()
    system: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    @classmethod
    def empty(cls) -> MessageHistory:
        """Return the history of a memory that was not fed any conversation."""
        return cls(secrets.token_hex(SALT_BYTES))

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> MessageHistory:
        """Return the history that `as_json` encoded; None gives `empty`."""
        if value is None:
            return cls.empty()
        talks = tuple(Talk(tuple(talk["digests"]), talk["pending"]) for talk in value["talks"])
        return cls(value["salt"], talks, tuple(value["system"]), tuple(value.get("keys", ())))

    def as_json(self) -> dict[str, Any]:
        """Return the history as JSON."""
        talks = [{"digests": list(talk.digests), "pending": talk.pending} for talk in self.talks]
        return {"salt": self.salt, "talks": talks, "system": list(self.system), "keys": list(self.keys)}

    def match(self, messages: Sequence[Message], key: str | None = None) -> KnownMessages:
        """Return which of `messages` were fed.

        The last message counts as new, unless the request is a retry. A request with an idempotency key is a retry if
        an earlier request had the same key. A request without one is a retry if it repeats the request that was fed
        last: sending the same message twice in a row cannot be distinguished from a retry.
        """
        digests = self._digests(messages)
        best, number = 0, None
        for index, talk in enumerate(self.talks):
            length = max(_common_length(digests, talk.digests[start:]) for start in range(len(talk.digests)))
            if length >= max(best, 1):  # the newest of the longest
                best, number = length, index
        talk_digests = () if number is None else self.talks[number].digests
        last = number is not None and number == len(self.talks) - 1
        is_retry = last and best == len(digests) and digests == talk_digests[:-1][-best:]
        if key is not None:
            is_retry = self._digest_of(key) in self.keys
        if best and best == len(digests) and not is_retry:
            best -= 1
        is_complete = best > 0 and digests[:best] == talk_digests[-best:]
        flags, place = [], 0
        for message in messages:
            if message["role"] in SYSTEM_ROLES:
                flags.append(self._digest(message) in self.system)
            else:
                flags.append(place < best)
                place += 1
        if is_retry:
            flags = [True] * len(flags)
        return KnownMessages(tuple(flags), number if best > 0 else None, is_complete, is_complete and last)

    def with_turn(
        self, known: KnownMessages, messages: Sequence[Message], answer: str, pending: int, key: str | None = None
    ) -> MessageHistory:
        """Return the history after a request and its answer, `pending` tokens of which were not fed."""
        system = [self._digest(message) for message in messages if message["role"] in SYSTEM_ROLES]
        system = list(dict.fromkeys([*self.system, *system]))[-MAX_SYSTEM:]
        digests = (*self._digests(messages), self._digest({"role": "assistant", "content": answer}))
        talks = [talk for number, talk in enumerate(self.talks) if not (number == known.talk and known.is_complete)]
        talks.append(Talk(digests, pending))
        while len(talks) > 1 and sum(len(talk.digests) for talk in talks) > MAX_DIGESTS:
            del talks[0]
        keys = self.keys if key is None else (*self.keys, self._digest_of(key))[-MAX_KEYS:]
        return replace(self, talks=tuple(talks), system=tuple(system), keys=keys)

    def _digests(self, messages: Sequence[Message]) -> tuple[str, ...]:
        return tuple(self._digest(message) for message in messages if message["role"] not in SYSTEM_ROLES)

    def _digest(self, message: Message) -> str:
        return self._digest_of(f"{message['role']}\n{text_of(message)}")

    def _digest_of(self, text: str) -> str:
        salt = bytes.fromhex(self.salt)
        return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES, key=salt).hexdigest()


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the common beginning of two lists."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
