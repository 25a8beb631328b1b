"""Scores of answers, and confidence intervals of their means."""
