"""Baselines for a memory: a LoRA or a static adapter on the same base model, and retrieval with BM25."""
