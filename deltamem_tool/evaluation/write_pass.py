"""Histories written into memories: sessions one after the other, each in a context of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.errors import DataError
from deltamem_tool.evaluation import BATCH_SIZE
from deltamem_tool.evaluation.subject import Subject, take_rows
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.segments.encode import encode_chat
from deltamem_tool.segments.messages import Message
from deltamem_tool.segments.tags import SegmentTag

CHUNK = 4096  # tokens of one call: what a long session takes in memory at once
History = Sequence[Sequence[Message]]  # sessions of messages


def memorise(
    subject: Subject,
    histories: Sequence[History],
    batch_size: int = BATCH_SIZE,
    report: Callable[[int, int], None] | None = None,
    places: Sequence[str] | None = None,
) -> StoredMemory:
    """Write each history, from a memory of zeros.

    Args:
        subject: whose memory it is.
        histories: the memory goes on from session to session, the context does not.
        batch_size: histories at once.
        report: called with (histories written, of).
        places: file and place of each history, for errors.

    Returns:
        A row for each history.

    Raises:
        DataError: the chat template refuses a session, or it has more tokens than the model has positions; nothing has
            been written then.
    """
    _check_lengths(subject, histories, places or [f"history {number}" for number in range(1, len(histories) + 1)])
    memory = take_rows(empty_memory(subject.engine), [0] * len(histories))
    for start in range(0, len(histories), batch_size):
        rows = range(start, min(start + batch_size, len(histories)))
        for number in range(max(len(histories[row]) for row in rows)):
            batch = [row for row in rows if number < len(histories[row])]
            after = _write(subject, [histories[row][number] for row in batch], take_rows(memory, batch))
            for part, written in ((memory.states, after.states), (memory.open_segments, after.open_segments)):
                for layer, array in written.items():
                    part[layer][batch] = array
        if report is not None:
            report(rows.stop, len(histories))
    return memory


def _check_lengths(subject: Subject, histories: Sequence[History], places: Sequence[str]) -> None:
    """Before any is written: the last history may be the long one, hours later."""
    if subject.positions is None:
        return
    for place, history in zip(places, histories, strict=True):
        for number, session in enumerate(history, start=1):
            try:
                length = encode_chat(subject.tokenizer, [session], "token").input_ids.shape[1]
            except DataError as error:
                what = error.what.removeprefix("Conversation 1: ")
                raise DataError(f"{place}: session {number} of its history: {what}", error.why, error.next) from error
            if length > subject.positions:
                raise DataError(
                    f"{place}: session {number} of its history is too long for the model: {length} tokens.",
                    f"It has {subject.positions} positions.",
                    "Split the session, or use a model with more positions.",
                )


def _write(subject: Subject, sessions: Sequence[Sequence[Message]], memory: StoredMemory) -> StoredMemory:
    """Write one session into each memory, in chunks."""
    engine = subject.engine
    # Padded on the right: the first chunk of a short session on the left would be padding alone, with nothing to see.
    chat = encode_chat(subject.tokenizer, sessions, engine.mechanism.granularity, padding_side="right")
    mask = chat.attention_mask.numpy()
    ids = chat.input_ids.numpy() * mask  # the tokenizer's padding may be an id that the model does not have
    tags = None if chat.segment_tags is None else chat.segment_tags.numpy()
    writes = mask.astype(bool) if tags is None else tags != SegmentTag.OUTSIDE
    past = engine.start(memory)
    for start in range(0, ids.shape[1], CHUNK):
        end = start + CHUNK
        ends = None if tags is None else tags[:, start:end] == SegmentTag.LAST
        _, past = engine.step(past, ids[:, start:end], mask[:, :end], writes[:, start:end], ends)
    return engine.memory(past)
