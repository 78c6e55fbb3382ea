import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastllama.config import ModelConfig, load_recipe
from fastllama.model.llama import Llama
from fastllama.planning.bound import ASSUMED_RATES, Rates, attention_rates, bound, min_bytes
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
def test_counts_the_parameters_of_the_model(config: ModelConfig) -> None:
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
def test_known_sizes(recipe: str, ffn_hidden: int, parameters: int) -> None:
    model = load_recipe(CONFIGS / f"{recipe}.toml").model
    assert (model.ffn_hidden, n_parameters(model)) == (ffn_hidden, parameters)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_counts_the_flops_pytorch_counts(config: ModelConfig) -> None:
    model = Llama(config, REFERENCE)
    tokens = torch.zeros(2, config.max_seq_len, dtype=torch.int64)
    # The fused kernels of the CPU are not in PyTorch's list; matrix products are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    per_token = counter.get_total_flops() / tokens.numel()
    assert flops_per_token(config, causal=False) == per_token


def test_causal_leaves_out_half_of_the_attention() -> None:
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
def test_peak_of_a_device_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


# The agreed bounds of one H200, each worked out apart from this code.
@pytest.mark.parametrize(
    ("recipe", "tok_per_s"),
    [
        ("llama-1b", 78_458),
        ("llama-100m", 832_579),
        ("llama-3.2-1b", 68_363),
        ("llama-3.1-8b", 13_645),
    ],
)
def test_bound_of_the_recipes(recipe: str, tok_per_s: float) -> None:
    model = load_recipe(CONFIGS / f"{recipe}.toml").model
    found = bound(model, 2**19, ASSUMED_RATES["H200"]).tokens_per_second
    assert found == pytest.approx(tok_per_s, rel=1e-3)


EASY = Rates(
    matmul=1e3,
    bandwidth=1e2,
    attention={64: {1024: (10.0, 4.0), 4096: (20.0, 8.0)}, 128: {1024: (30.0, 12.0)}},
    source="made up",
)


def test_parts_of_the_bound_are_work_over_rate() -> None:
    parts = bound(SMALL, 1000, EASY)
    n_matmul = (flops_per_token(SMALL, causal=False) - 12 * 3 * 32 * 40) / 6
    assert parts.matmul == pytest.approx(6 * n_matmul / 1e3)
    assert parts.attention_forward == pytest.approx(2 * 3 * 32 * 40 / 10)
    assert parts.attention_backward == pytest.approx(5 * 3 * 32 * 40 / 4)
    # AdamW: 12 bytes of weight and moments read and written, a gradient read, a weight written.
    assert parts.optimizer == pytest.approx((2 * 12 + 4) * n_parameters(SMALL) / 1000 / 1e2)
    assert parts.seconds_per_token == pytest.approx(
        parts.matmul
        + parts.attention_forward
        + parts.attention_backward
        + sum(parts.memory.values())
        + parts.optimizer
    )


def test_min_bytes_are_those_of_the_operators() -> None:
    """By hand, bfloat16: 3 layers of width 32, 4 query and 2 key heads of 8, feed-forward 96."""
    layers, width, model = 3, 32, SHAPES["grouped"]
    assert min_bytes(model) == {
        # Two a layer and the last: 4 tensors forward, 4 backward, of 2 bytes.
        "rms_norm": (2 * layers + 1) * 8 * 2 * width,
        # Read and written, forward and backward.
        "rope": layers * 4 * 2 * (4 + 2) * 8,
        # 3 forward and 5 backward.
        "swiglu": layers * 8 * 2 * 96,
        "cross_entropy": 2 * 2 * 48,
        # Rows read and written, their gradients read and written.
        "embedding": 4 * 2 * width,
    }


@pytest.mark.parametrize(
    ("head_dim", "seq_len", "rates"),
    [
        (64, 1024, (10.0, 4.0)),
        (64, 2048, (15.0, 6.0)),  # Half way in the logarithm.
        (64, 512, (10.0, 4.0)),
        (64, 8192, (20.0, 8.0)),
        (32, 1024, (10.0, 4.0)),
        (96, 1024, (30.0, 12.0)),
        (256, 1024, (30.0, 12.0)),
    ],
)
def test_attention_rates_between_those_known(
    head_dim: int, seq_len: int, rates: tuple[float, float]
) -> None:
    assert attention_rates(EASY, head_dim, seq_len) == pytest.approx(rates)


def test_hardware_flops_add_the_scores_computed_again() -> None:
    """Causal attention is 2 products forward and 4 backward; FlashAttention does 5."""
    causal = flops_per_token(SMALL, causal=True)
    no_attention = flops_per_token(dataclasses.replace(SMALL, max_seq_len=0), causal=True)
    again = hardware_flops_per_token(SMALL) - causal
    assert again == pytest.approx((causal - no_attention) / 6)
