"""The LLaMA: the trained model, the reference model, activation checkpointing."""
