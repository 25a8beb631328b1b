"""Adapter folders: write, read, load onto the base model, and convert from and to the reference implementation.

The trained module itself is `memory.adapter.DeltaMemAdapter`.
"""
