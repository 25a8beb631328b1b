"""The base model of a memory: its checkpoint, its attention layers, and the supported model types."""
