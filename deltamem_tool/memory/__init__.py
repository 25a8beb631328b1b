"""The memory of a model: the module of a layer, the state of a conversation, and the hooks that connect them.

Start with `layer.DeltaMemLayer`, `state.MemoryState` and `cache.MemoryCache`; `attach` and `hooks` put them on a model.
"""
