"""Weights in and out: other formats than the checkpoints of a run."""
