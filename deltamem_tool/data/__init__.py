"""Conversations become training episodes: what is written, and what is then asked with nothing but the memory.

An episode (arXiv 2605.12357, section 3.4): the write pass sees the history, the read pass a question and its answer,
and only the answer is scored. A source's rows (`sources`) become episodes (`episode`), or dialogues are generated
(`dialogues`, `synthetic`); episodes become tokens (`encode`), which are kept on disk (`store`) and batched (`collate`).
"""
