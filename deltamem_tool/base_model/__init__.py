"""The model that a memory goes onto: its checkpoint, its attention layers, and which types are supported."""
