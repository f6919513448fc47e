"""Encoded pictures -> pixels for an encoder, and other views of them for training."""
