"""Continuous batching: requests join and leave the batch between any two decode steps. Imports no torch."""
