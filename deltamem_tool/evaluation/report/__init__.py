"""Outputs of an evaluation: a JSON file, tables, plots, and a page."""
