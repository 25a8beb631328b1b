"""Ablations: one recipe trained with one thing changed at a time, over seeds, each adapter asked the same questions.
What the command takes by default is spelled here, where nothing heavy is imported."""

SEEDS = (42, 43, 44)
EPISODES = 100  # conversations for each number of facts
FACTS = (1, 2, 4, 6, 8)
