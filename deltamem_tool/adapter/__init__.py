"""Adapter folders: written, read, loaded onto their base model, converted from and to the reference's.

The module that is trained is `memory.adapter.DeltaMemAdapter`.
"""
