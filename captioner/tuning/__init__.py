"""A search over many training runs, on Ray Tune."""
