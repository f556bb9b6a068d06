"""Graphs to a running engine: bundle manifest, sessions, continuous-batching decoder runtime."""
