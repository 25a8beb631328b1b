"""What can go wrong, as users meet it.

    DeltaMemError
    ├── ConfigError         an option or a recipe that cannot be
    ├── ArchitectureError   a base model that cannot take a memory
    ├── AdapterError        an adapter folder that is damaged, or does not fit the base model
    ├── MemoryStateError    a memory that is damaged, or does not fit the adapter, the batch or the layers
    ├── DataError           training or evaluation data that cannot be read
    └── ExportError         an ONNX folder that is damaged, or a graph that does not compute what PyTorch computes

Each carries what failed, why, and what to do next; the command line prints those three and nothing else.
"""

from __future__ import annotations


class DeltaMemError(Exception):
    """`what` failed, `why`, and what to do `next`: one sentence each."""

    def __init__(self, what: str, why: str = "", next: str = "") -> None:
        super().__init__("\n".join(part for part in (what, why, next) if part))
        self.what, self.why, self.next = what, why, next


class ConfigError(DeltaMemError, ValueError):
    pass


class ArchitectureError(DeltaMemError, ValueError):
    pass


class AdapterError(DeltaMemError):
    pass


class MemoryStateError(DeltaMemError, ValueError):
    pass


class DataError(DeltaMemError, ValueError):
    pass


class ExportError(DeltaMemError):
    pass
