"""The operators of a LLaMA training step: `REFERENCE` in plain PyTorch, one file an operator."""

from fastllama_kernels.operators import REFERENCE, Operators

__all__ = ["REFERENCE", "Operators"]
