"""The operators of a LLaMA training step, one file per operator.

The functions run Triton kernels on CUDA tensors, and `attention` runs PyTorch's SDPA. `TRITON`
holds the same functions as one set; `REFERENCE` holds plain PyTorch versions for any device. `CPU`
holds versions for torch.compile on a CPU.
"""

# The functions hide the modules of the same names as attributes of this package. Import from a
# module with `from fastllama_kernels.rope import ...`.
from fastllama_kernels._linear import can_pack, linear, linear_add, pack_weight
from fastllama_kernels.attention import attention
from fastllama_kernels.cross_entropy import cross_entropy
from fastllama_kernels.linear_cross_entropy import linear_cross_entropy
from fastllama_kernels.operators import CPU, REFERENCE, TRITON, TRITON_SAVING, Operators
from fastllama_kernels.rms_norm import add_rms_norm, add_rms_norm_linear, rms_norm
from fastllama_kernels.rope import rope
from fastllama_kernels.swiglu import swiglu, swiglu_linear

__all__ = [
    "CPU",
    "REFERENCE",
    "TRITON",
    "TRITON_SAVING",
    "Operators",
    "add_rms_norm",
    "add_rms_norm_linear",
    "attention",
    "can_pack",
    "cross_entropy",
    "linear",
    "linear_add",
    "linear_cross_entropy",
    "pack_weight",
    "rms_norm",
    "rope",
    "swiglu",
    "swiglu_linear",
]
