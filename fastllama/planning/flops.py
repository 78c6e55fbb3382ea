"""Parameters and FLOPs of a model, and peak FLOP/s of known GPUs.

There are two FLOP conventions, and both are in use. They differ by up to 1.4x at long sequences.
PaLM (Chowdhery et al. 2022, appendix B) counts attention without a mask. Causal counts only the
half below the diagonal. Both count the output projection, and neither counts the embedding lookup
or recomputation.
"""

import re

from fastllama.config import ModelConfig

# Dense bf16 FLOP/s from the data sheets, by a part of torch.cuda.get_device_name(). The first match
# counts, so longer names come before their prefixes.
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
    """Parameters of the model. A tied embedding counts once."""
    embedding = model.vocab_size * model.n_embd
    norms = (2 * model.n_layers + 1) * model.n_embd
    return matmul_parameters(model) + (0 if model.tied_embeddings else embedding) + norms


def n_block_parameters(model: ModelConfig) -> int:
    """Parameters of one block."""
    return _block_matmul_parameters(model) + 2 * model.n_embd


def _block_matmul_parameters(model: ModelConfig) -> int:
    qkv = model.n_embd * (model.n_heads + 2 * model.kv_heads) * model.head_width
    output = model.attention_width * model.n_embd
    return qkv + output + 3 * model.n_embd * model.ffn_width


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters of the matmuls: all except the norms and the embedding lookup."""
    return model.n_layers * _block_matmul_parameters(model) + model.vocab_size * model.n_embd


def flops_per_token(model: ModelConfig, *, causal: bool) -> float:
    """FLOPs of forward and backward for one token of a `max_seq_len` sequence.

    6 per matmul parameter, and 12 * n_layers * H * K * T for the two matmuls of attention over T
    keys with H heads of width K.
    `causal` counts half of the attention, PaLM's convention (causal=False) all of it.
    """
    attention = 12 * model.n_layers * model.attention_width * model.max_seq_len
    return 6.0 * matmul_parameters(model) + attention / (2 if causal else 1)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name; None for an unknown device."""
    for name, peak in PEAK_BF16_FLOPS.items():
        # Match whole words: a GB200 is not a B200, an RTX 4090 Laptop or 4090 D not an RTX 4090.
        if re.search(rf"\b{name}\b(?! (Ti|SUPER|D|Laptop))", device_name):
            return peak
    return None


def hardware_flops_per_token(model: ModelConfig) -> float:
    """FLOPs per token that the hardware executes: causal, with recomputed attention scores.

    FlashAttention (Dao 2023, https://arxiv.org/abs/2307.08691) computes two matmuls over the keys
    in the forward and five in the backward, one of them to recompute the scores.
    """
    scores = model.n_layers * model.attention_width * model.max_seq_len
    return flops_per_token(model, causal=True) + scores
