"""Evaluation of a memory: tasks, protocols, conditions, and the uncertainty of the results.

A task asks questions, a protocol says what is in the context besides the memory, and conditions compare the memory with
its controls. Start with `runner.evaluate`. The defaults of the commands are defined here, where nothing heavy is
imported.
"""

RECALL, MEMORY_ONLY = "recall", "memory"  # the task and the protocol, unless told otherwise
BATCH_SIZE = 100  # conversations at once
EPISODES = 200  # of the recall task, for each number of facts
FACTS = (1, 2, 3, 4, 6, 8)  # how many are told, in the recall task, unless told otherwise
HARNESS = "lm_eval:"  # before the names of tasks of lm-evaluation-harness
HARNESS_BATCH_SIZE = 8  # of its requests: it takes the logits of whole prompts
