"""Ablations: many runs of a grid of recipes, and what they say together. Imports no torch."""
