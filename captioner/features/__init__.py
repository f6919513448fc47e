"""Extraction: a source of pictures -> a feature store, on Ray Data."""
