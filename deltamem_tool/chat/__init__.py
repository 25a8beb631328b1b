"""Conversations with a memory, over either runtime: what is said, fed, generated. Only `torch_engine` needs torch."""
