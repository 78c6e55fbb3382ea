"""Checkpoints: their contents, their folder, writing and reading."""
