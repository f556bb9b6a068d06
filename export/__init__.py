"""Checkpoint to graphs: reader of Hugging Face checkpoints, authors of the vision and decoder graphs."""
