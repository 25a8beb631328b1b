"""Adapters of the reference implementation."""
