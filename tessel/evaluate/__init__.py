"""Scores of a model on sets of questions."""
