"""The recurrence of δ-mem on plain tensors (arXiv 2605.12357); README.md beside this file has the derivation."""
