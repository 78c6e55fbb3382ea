"""Using a model: generation and evaluation."""
