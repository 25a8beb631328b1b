"""A cache that remembers what beam search did to it."""

from deltamem_tool import MemoryCache


class WatchedCache(MemoryCache):
    """`taken`: the rows that each step went on from; `memories`: the memory before each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.taken, self.memories = [], []

    def reorder_cache(self, beam_idx):
        self.taken.append(beam_idx.tolist())
        self.memories.append(self.memory)
        super().reorder_cache(beam_idx)
