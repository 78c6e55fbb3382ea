import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastllama.config import ModelConfig, load_recipe
from fastllama.model.llama import Llama
from fastllama.planning.flops import (
    flops_per_token,
    hardware_flops_per_token,
    n_parameters,
    peak_flops,
)
from fastllama_kernels import REFERENCE

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ModelConfig(vocab_size=48, n_embd=32, n_layers=3, n_heads=4, multiple_of=16, max_seq_len=40)
SHAPES = {
    "multi-head": SMALL,
    "grouped": dataclasses.replace(SMALL, n_kv_heads=2),
    "tied": dataclasses.replace(SMALL, tied_embeddings=True),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_n_parameters(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Llama(config, REFERENCE)
    assert n_parameters(config) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "ffn_hidden", "parameters"),
    [
        ("llama-100m", 2048, 97_536_768),
        ("llama-1b", 5632, 1_266_780_160),
        # As published with the weights of Llama 3.2 1B and 3.1 8B.
        ("llama-3.2-1b", 8192, 1_235_814_400),
        ("llama-3.1-8b", 14336, 8_030_261_248),
    ],
)
def test_sizes_of_the_recipes(recipe: str, ffn_hidden: int, parameters: int) -> None:
    model = load_recipe(CONFIGS / f"{recipe}.toml").model
    assert (model.ffn_width, n_parameters(model)) == (ffn_hidden, parameters)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_flops_match_pytorch(config: ModelConfig) -> None:
    model = Llama(config, REFERENCE)
    tokens = torch.zeros(2, config.max_seq_len, dtype=torch.int64)
    # PyTorch's counter knows matmuls, but not the fused attention kernels of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    per_token = counter.get_total_flops() / tokens.numel()
    assert flops_per_token(config, causal=False) == per_token


def test_causal_counts_half_of_attention() -> None:
    full, causal = (flops_per_token(SMALL, causal=causal) for causal in (False, True))
    no_attention = flops_per_token(dataclasses.replace(SMALL, max_seq_len=0), causal=False)
    assert causal - no_attention == (full - no_attention) / 2 > 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA H20", None),
        ("", None),
    ],
)
def test_peak_flops(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_hardware_flops_add_recomputed_scores() -> None:
    """Causal attention is 2 matmuls forward and 4 backward. FlashAttention computes 5 backward."""
    causal = flops_per_token(SMALL, causal=True)
    no_attention = flops_per_token(dataclasses.replace(SMALL, max_seq_len=0), causal=True)
    recomputed = hardware_flops_per_token(SMALL) - causal
    assert recomputed == pytest.approx((causal - no_attention) / 6)
