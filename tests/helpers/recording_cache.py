"""A cache that records how beam search reorders it."""

from deltamem_tool import MemoryCache


class RecordingCache(MemoryCache):
    """`taken`: the rows selected at each step; `memories`: the memory before each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.taken, self.memories = [], []

    def reorder_cache(self, beam_idx):
        self.taken.append(beam_idx.tolist())
        self.memories.append(self.memory)
        super().reorder_cache(beam_idx)
