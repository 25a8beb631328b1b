"""Write histories into memories, session by session, each session in a context of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.errors import DataError
from deltamem_tool.evaluation import BATCH_SIZE
from deltamem_tool.evaluation.memories import take_rows
from deltamem_tool.evaluation.subject import Subject
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.segments.encode import TaggedChat, batch_chats, tag_messages
from deltamem_tool.segments.messages import Message
from deltamem_tool.segments.tags import SegmentTag
from deltamem_tool.segments.template import ChatTemplate

CHUNK = 4096  # tokens of one call: what a long session takes in memory at once
History = Sequence[Sequence[Message]]  # sessions of messages


def memorise(
    subject: Subject,
    histories: Sequence[History],
    batch_size: int = BATCH_SIZE,
    report: Callable[[int, int], None] | None = None,
    places: Sequence[str] | None = None,
    template_kwargs: Sequence[Mapping[str, Any]] | None = None,
) -> StoredMemory:
    """Write each history into a memory that starts from zeros.

    Args:
        subject: the model.
        histories: histories of sessions. The memory is carried from session to session, the context is not.
        batch_size: number of histories at once.
        report: called with the number of histories written, and their total.
        places: file and position of each history, for error messages.
        template_kwargs: further arguments for the chat template, for each history.

    Returns:
        A memory with a row for each history.

    Raises:
        DataError: the chat template rejects a session, or a session has more tokens than the model has positions.
            Nothing has been written in that case.
    """
    template = ChatTemplate.from_tokenizer(subject.tokenizer)
    places = places or [f"history {number}" for number in range(1, len(histories) + 1)]
    kwargs = template_kwargs or [{}] * len(histories)
    _check_lengths(subject, template, histories, places, kwargs)
    memory = take_rows(empty_memory(subject.engine), [0] * len(histories))
    for start in range(0, len(histories), batch_size):
        rows = range(start, min(start + batch_size, len(histories)))
        for number in range(max(len(histories[row]) for row in rows)):
            batch = [row for row in rows if number < len(histories[row])]
            sessions = [
                tag_messages(
                    subject.tokenizer,
                    template.with_kwargs(kwargs[row]),
                    histories[row][number],
                    subject.engine.mechanism.granularity,
                )
                for row in batch
            ]
            after = _write(subject, sessions, take_rows(memory, batch))
            for part, written in ((memory.states, after.states), (memory.open_segments, after.open_segments)):
                for layer, array in written.items():
                    part[layer][batch] = array
        if report is not None:
            report(rows.stop, len(histories))
    return memory


def _check_lengths(
    subject: Subject,
    template: ChatTemplate,
    histories: Sequence[History],
    places: Sequence[str],
    template_kwargs: Sequence[Mapping[str, Any]],
) -> None:
    """Before any is written: the last history may be the long one, hours later."""
    if subject.positions is None:
        return
    for place, history, kwargs in zip(places, histories, template_kwargs, strict=True):
        for number, session in enumerate(history, start=1):
            try:
                length = len(tag_messages(subject.tokenizer, template.with_kwargs(kwargs), session, "token").input_ids)
            except DataError as error:
                at = f"{place}: session {number} of its history: "
                raise DataError(at + error.what, error.why, error.next) from error
            if length > subject.positions:
                raise DataError(
                    f"{place}: session {number} of its history is too long for the model: {length} tokens.",
                    f"It has {subject.positions} positions.",
                    "Split the session, or use a model with more positions.",
                )


def _write(subject: Subject, sessions: Sequence[TaggedChat], memory: StoredMemory) -> StoredMemory:
    """Write one session into each memory, in chunks."""
    engine = subject.engine
    # Padded on the right: the first chunk of a short session on the left would be padding alone, with nothing to see.
    chat = batch_chats(subject.tokenizer, sessions, engine.mechanism.granularity, padding_side="right")
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
