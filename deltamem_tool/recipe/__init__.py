"""Recipes, which describe training runs: their options, and how a recipe file is read."""
