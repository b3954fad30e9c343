"""Benchmarks: arms against each other on tasks and seeds, each a run in its own process; their numbers side by side."""
