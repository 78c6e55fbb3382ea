"""Checkpoints: what is in one, writing, reading."""
