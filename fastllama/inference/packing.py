"""Weights in the order in which a CPU's matmul reads them."""

from torch import nn

from fastllama.model.llama import Linear, Llama
from fastllama_kernels import can_pack, pack_weight


def pack_weights(model: Llama) -> None:
    """Replace the weights of projections by packed copies, where the device has them.

    The model then decodes faster on a CPU. It can neither train nor be saved.
    """
    for module in model.modules():
        if isinstance(module, Linear) and can_pack(module.weight):
            module.weight = nn.Parameter(pack_weight(module.weight), requires_grad=False)
