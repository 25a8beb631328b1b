"""The memory of a model: a layer's module, a conversation's state, and the hooks that join both to a model."""
