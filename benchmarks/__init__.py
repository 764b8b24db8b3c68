"""Benchmarks: run from the clone, `python -m benchmarks.speed`."""
