"""Conversations become training episodes: what is written, and what is then asked with nothing but the memory.

An episode (arXiv 2605.12357, section 3.4): the write pass sees the history, the read pass a question and its answer,
and only the answer is scored. A source's rows (`sources`) become episodes (`episode`), or these are generated, from the
shipped backbone's words (`dialogues`, `synthetic`) or from natural facts (`fact_words`, `facts`, `fact_conversations`,
`fact_episodes`); episodes become tokens (`encode`), which are kept on disk (`store`) and batched (`collate`).
"""
