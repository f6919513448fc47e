"""What every job needs around its work: a Ray cluster, a command line, progress."""
