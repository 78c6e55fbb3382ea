import dataclasses
from functools import partial
from pathlib import Path

import pytest

from benchmarks.ceilings import measured_rates
from benchmarks.results import RESULTS, Ceiling, read
from fastllama.config import ModelConfig, load_recipe
from fastllama.planning.bound import DEVICE_RATES, Rates, attention_rates, bound, min_bytes
from fastllama.planning.flops import flops_per_token, n_parameters

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ModelConfig(vocab_size=48, n_embd=32, n_layers=3, n_heads=4, multiple_of=16, max_seq_len=40)


# Bounds of one H200, computed independently of this code.
@pytest.mark.parametrize(
    ("recipe", "tok_per_s"),
    [
        ("llama-1b", 78_458),
        ("llama-100m", 832_579),
        ("llama-3.2-1b", 68_363),
        ("llama-3.1-8b", 13_645),
    ],
)
def test_bound_of_recipes(recipe: str, tok_per_s: float) -> None:
    model = load_recipe(CONFIGS / f"{recipe}.toml").model
    found = bound(model, 2**19, DEVICE_RATES["H200"]).tokens_per_second
    assert found == pytest.approx(tok_per_s, rel=1e-3)


def test_rates_of_the_h100_are_the_measured_ones() -> None:
    ceilings = [one for _, one in read(RESULTS / "h100-80gb-hbm3", Ceiling)]
    measured, known = measured_rates(ceilings), DEVICE_RATES["H100"]
    assert measured is not None
    # Written with three digits.
    near = partial(pytest.approx, rel=5e-3)
    assert (known.matmul, known.bandwidth) == near((measured.matmul, measured.bandwidth))
    for head_dim, by_length in measured.attention.items():
        assert known.attention[head_dim].keys() == by_length.keys()
        for length, rates in by_length.items():
            assert known.attention[head_dim][length] == near(rates)


ROUND_RATES = Rates(
    matmul=1e3,
    bandwidth=1e2,
    attention={64: {1024: (10.0, 4.0), 4096: (20.0, 8.0)}, 128: {1024: (30.0, 12.0)}},
    source="made up",
)


def test_parts_of_bound() -> None:
    parts = bound(SMALL, 1000, ROUND_RATES)
    n_matmul = (flops_per_token(SMALL, causal=False) - 12 * 3 * 32 * 40) / 6
    assert parts.matmul == pytest.approx(6 * n_matmul / 1e3)
    assert parts.attention_forward == pytest.approx(2 * 3 * 32 * 40 / 10)
    assert parts.attention_backward == pytest.approx(5 * 3 * 32 * 40 / 4)
    # AdamW reads and writes 12 bytes of weight and moments, reads a gradient, writes a weight.
    assert parts.optimizer == pytest.approx((2 * 12 + 4) * n_parameters(SMALL) / 1000 / 1e2)
    assert parts.seconds_per_token == pytest.approx(
        parts.matmul
        + parts.attention_forward
        + parts.attention_backward
        + sum(parts.memory.values())
        + parts.optimizer
    )


def test_min_bytes() -> None:
    """By hand in bf16: 3 layers, D = 32, H = 4, G = 2, K = 8, F = 96."""
    layers, width, model = 3, 32, dataclasses.replace(SMALL, n_kv_heads=2)
    assert min_bytes(model) == {
        # Two per layer and the final norm: 4 tensors forward, 4 backward, 2 bytes per element.
        "rms_norm": (2 * layers + 1) * 8 * 2 * width,
        # One read and one write, forward and backward.
        "rope": layers * 4 * 2 * (4 + 2) * 8,
        # 3 tensors forward, 5 backward.
        "swiglu": layers * 8 * 2 * 96,
        "cross_entropy": 2 * 2 * 48,
        # Read and write the rows, read and write their gradients.
        "embedding": 4 * 2 * width,
    }


@pytest.mark.parametrize(
    ("head_dim", "seq_len", "rates"),
    [
        (64, 1024, (10.0, 4.0)),
        (64, 2048, (15.0, 6.0)),  # Halfway in the logarithm.
        (64, 512, (10.0, 4.0)),
        (64, 8192, (20.0, 8.0)),
        (32, 1024, (10.0, 4.0)),
        (96, 1024, (30.0, 12.0)),
        (256, 1024, (30.0, 12.0)),
    ],
)
def test_attention_rates_interpolate(
    head_dim: int, seq_len: int, rates: tuple[float, float]
) -> None:
    assert attention_rates(ROUND_RATES, head_dim, seq_len) == pytest.approx(rates)
