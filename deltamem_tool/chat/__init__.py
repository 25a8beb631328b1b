"""Conversations with a memory, over either runtime: what is said, fed, generated. Only `torch_runtime` needs torch."""
