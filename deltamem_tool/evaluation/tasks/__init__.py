"""The tasks, one a file; `evaluation.task` finds them by name."""
