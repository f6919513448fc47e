"""Decoders behind one protocol, and the search that turns their logits into captions."""
