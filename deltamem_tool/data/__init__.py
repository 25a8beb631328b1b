"""Turn conversations into training episodes: a history to write, and questions to answer from the memory alone.

In an episode (arXiv 2605.12357, section 3.4), the write pass sees the history, and the read pass sees a question and
its answer. Only the answer is scored.

Episodes (`episode`) are made from the rows of a source (`sources`), or generated: from the words of the shipped
backbone (`dialogues`, `synthetic`), or from natural facts (`fact_words`, `facts`, `fact_conversations`,
`fact_episodes`). They are then tokenised (`encode`), kept on disk (`store`) and batched (`collate`).
"""
