"""Frozen image networks: pixels -> a pooled vector and a grid of vectors."""
