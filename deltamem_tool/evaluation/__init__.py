RECALL, MEMORY_ONLY = "recall", "memory"  # the task and the protocol, unless told otherwise
FACTS = (1, 2, 3, 4, 6, 8)  # how many are told, in the recall task, unless told otherwise
