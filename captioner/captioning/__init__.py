"""Captions of pictures: the Captioner, and the Ray Data job that maps it over a collection."""
