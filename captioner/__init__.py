"""Distributed image captioning on Ray: extract features, train decoders, evaluate, caption, serve."""

__version__ = "0.1.0"
