"""Hand-made batches of training steps."""

from __future__ import annotations

import torch
from helpers.tiny import tokens
from torch import Tensor

from deltamem_tool.data.encode import IGNORED
from deltamem_tool.segments.tags import SegmentTag


def episode_batch(scored=((3, 4), (2,), (4,)), lengths=(7, 4), segments: bool = False) -> dict[str, Tensor]:
    """Two conversations with two exchanges and one, of different lengths, padded on the right."""
    width = max(lengths)
    write_ids, write_mask = tokens(2, width), torch.ones(2, width, dtype=torch.long)
    read_ids, read_mask = tokens(3, 6, seed=1), torch.ones(3, 6, dtype=torch.long)
    for row, length in enumerate(lengths):
        write_mask[row, length:] = 0
    read_mask[1, 4:] = 0
    labels = torch.full_like(read_ids, IGNORED)
    for row, columns in enumerate(scored):
        labels[row, list(columns)] = read_ids[row, list(columns)]
    batch = {"write_ids": write_ids, "write_mask": write_mask, "read_ids": read_ids, "read_mask": read_mask}
    batch |= {"labels": labels, "rows": torch.tensor([0, 0, 1])}
    if segments:
        tags = torch.full((2, width), SegmentTag.INSIDE, dtype=torch.int8)
        tags[:, 2::3] = SegmentTag.LAST
        batch["write_segment_tags"] = tags * write_mask.to(torch.int8)
    return batch | positions(labels)


def positions(labels: Tensor) -> dict[str, Tensor]:
    """Flat positions of the tokens before scored ones, and the scored tokens."""
    places = [(row, t) for row in range(len(labels)) for t in range(1, labels.shape[1]) if labels[row, t] != IGNORED]
    return {
        "scored": torch.tensor([row * labels.shape[1] + t - 1 for row, t in places]),
        "targets": torch.tensor([int(labels[row, t]) for row, t in places]),
    }


def with_unrelated(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds to each conversation an exchange that needs no memory, with two scored tokens and one."""
    ids, mask = tokens(2, 5, seed=2), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    scored = torch.tensor([2, 3, 5 + 1])
    return batch | {"unrelated_ids": ids, "unrelated_mask": mask, "unrelated_scored": scored}


def with_full_context(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds each exchange after its whole history as one text."""
    texts, scored = [], []
    for row, conversation in enumerate(batch["rows"].tolist()):
        history = batch["write_ids"][conversation][batch["write_mask"][conversation].bool()]
        exchange = batch["read_ids"][row][batch["read_mask"][row].bool()]
        texts.append(torch.cat([history, exchange]))
        scored += [(row, len(history) + t - 1) for t in (batch["labels"][row] != IGNORED).nonzero()[:, 0].tolist()]
    width = max(map(len, texts))
    ids = torch.stack([torch.cat([text, text.new_zeros(width - len(text))]) for text in texts])
    mask = torch.stack([(torch.arange(width) < len(text)).long() for text in texts])
    flat = torch.tensor([row * width + t for row, t in scored])
    return batch | {"full_ids": ids, "full_mask": mask, "full_scored": flat}
