"""A server of many conversations, each with a memory of its own, over one loaded model."""
