"""Benchmarks of the fused ops beside their peers: ``python -m bench --help``."""
