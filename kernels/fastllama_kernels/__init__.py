"""The operators of a LLaMA training step."""
