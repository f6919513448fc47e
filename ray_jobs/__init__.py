"""Entry points, each one Ray job: ``python -m ray_jobs.NAME --help``."""
