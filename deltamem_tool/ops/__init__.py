"""The recurrence of δ-mem on plain tensors (arXiv 2605.12357).

Start with `scan.delta_scan`, which chooses an implementation, and `naive`, which is the equation itself. README.md in
this folder has the derivation.
"""
