"""What the memory is worth: tasks, protocols, conditions, and how sure a figure is. What commands take by default is
spelled here, where nothing heavy is imported."""

RECALL, MEMORY_ONLY = "recall", "memory"  # the task and the protocol, unless told otherwise
BATCH_SIZE = 100  # conversations at once
EPISODES = 200  # of the recall task, for each number of facts
FACTS = (1, 2, 3, 4, 6, 8)  # how many are told, in the recall task, unless told otherwise
