"""Scores of a model on one split, its predictions and pictures."""
