"""Arithmetic over a configuration: parameters, FLOPs, the device's peak, and the bound H.

Two FLOP conventions are in use and differ by up to 1.4x at long sequences, so both are given:
PaLM (Chowdhery et al. 2022, appendix B) counts attention as if nothing were masked; causal counts
only the half below the diagonal. Both count the output projection, not the embedding lookup, and
no recomputation.

The bound is the least time a training step can take on one device, part by part:

    H = 1 / (matmul + attention + memory + optimizer), seconds a token of each

Each part is alone on the device at a rate that its best kernel reaches, so no schedule of these
kernels is faster. Matrix products run at the rate of a large one; attention at the rate of the best
kernel for its head width and length; everything else moves the fewest bytes that one well-fused
kernel each can move, at the bandwidth of a copy. Recomputation is not in it.
"""

import re

from fastllama.config import ModelConfig

# Dense bf16 FLOP/s without sparsity, from the makers' data sheets, by a part of the name
# that torch.cuda.get_device_name gives. Order matters: the first match counts.
PEAK_BF16_FLOPS = {
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def n_parameters(model: ModelConfig) -> int:
    """Parameters of the model; a tied embedding counts once."""
    embedding = model.vocab_size * model.n_embd
    norms = (2 * model.n_layers + 1) * model.n_embd
    return matmul_parameters(model) + (0 if model.tied_embeddings else embedding) + norms


def n_block_parameters(model: ModelConfig) -> int:
    """Parameters of one block."""
    return _block_matmul_parameters(model) + 2 * model.n_embd


def _block_matmul_parameters(model: ModelConfig) -> int:
    qkv = model.n_embd * (model.n_heads + 2 * model.kv_heads) * model.head_dim
    return qkv + model.n_embd**2 + 3 * model.n_embd * model.ffn_hidden


def matmul_parameters(model: ModelConfig) -> int:
    """Weights that a token is multiplied with: all but the norms and the embedding lookup."""
    return model.n_layers * _block_matmul_parameters(model) + model.vocab_size * model.n_embd


def flops_per_token(model: ModelConfig, *, causal: bool) -> float:
    """FLOPs of forward and backward for one token of a `max_seq_len` sequence.

    6 per weight of a matrix product, and 12·L·D·T for the two attention products over T keys,
    halved where `causal` counts what the mask leaves.
    """
    attention = 12 * model.n_layers * model.n_embd * model.max_seq_len
    return 6.0 * matmul_parameters(model) + attention / (2 if causal else 1)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name, or None where it is not known."""
    for name, peak in PEAK_BF16_FLOPS.items():
        # Whole words: a GB200 is no B200, an RTX 4090 Laptop or 4090 D no RTX 4090.
        if re.search(rf"\b{name}\b(?! (Ti|SUPER|D|Laptop))", device_name):
            return peak
    return None


def hardware_flops_per_token(model: ModelConfig) -> float:
    """FLOPs a token that are executed: causal, and scores computed again in the backward.

    What FlashAttention does (Dao 2023, https://arxiv.org/abs/2307.08691): two products over the
    keys in the forward, five in the backward.
    """
    scores = model.n_layers * model.n_embd * model.max_seq_len
    return flops_per_token(model, causal=True) + scores
