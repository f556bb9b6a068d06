"""Chest X-ray reasoning models, from checkpoint to a served, measured, verified Triton ensemble."""

__version__ = "0.1.0"
