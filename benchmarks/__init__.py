"""Benchmarks: what a stage of the system reaches on this machine or cluster, against its own limits."""
