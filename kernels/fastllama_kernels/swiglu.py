"""SwiGLU: out = silu(gate) * up, silu(x) = x / (1 + exp(-x)).

Shapes: gate_up (..., 2F), the packed projection with the gate first; out (..., F). The product is
in float32 (float64 for float64 inputs), rounded once.
Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels._dtype import accumulation_dtype


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Gate the second half of the last dimension of `gate_up` (..., 2F) by the first."""
    gate, up = gate_up.to(accumulation_dtype(gate_up)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
