"""Benchmarks: every speed carries its bandwidth and its share of the measured peak."""
