"""The operators of a LLaMA training step, one file an operator.

`REFERENCE` is plain PyTorch, `TRITON` the kernels.
"""

from fastllama_kernels.operators import REFERENCE, TRITON, Operators

__all__ = ["REFERENCE", "TRITON", "Operators"]
