"""The built-in tasks, one per file; `evaluation.task` finds them by name."""
