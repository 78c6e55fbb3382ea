"""The bound H: the most tokens per second that training can reach on one device.

    H = 1 / (matmul + attention + memory + optimizer), each in seconds per token

Each part runs alone on the device at the rate of its best kernel, so no schedule of these kernels
is faster:

- matmul: all matmuls, at the rate of a large matmul.
- attention: at the rate of the best kernel for its head width and sequence length.
- memory: each other operator as one fused kernel that moves the fewest bytes possible, at the
  bandwidth of a device copy.
- optimizer: AdamW in one such kernel.

Recomputation is not counted.
"""

import math
from dataclasses import dataclass

from fastllama.config import ModelConfig
from fastllama.planning.flops import matmul_parameters, n_parameters

ADAMW_BYTES = 28
"""Bytes per parameter and update: read a bf16 gradient and float32 weight and moments (14), write
the float32 weight and moments and a bf16 weight (14)."""


@dataclass(frozen=True)
class Rates:
    """The best rates of one device."""

    matmul: float
    """FLOP/s of a large bf16 matmul of random numbers."""
    bandwidth: float
    """Bytes/s of a device copy, read and written bytes together."""
    attention: dict[int, dict[int, tuple[float, float]]]
    """FLOP/s of causal attention, (forward, backward), by head width K and sequence length T.

    A forward counts 2 T^2 K FLOPs per head, a backward 2.5 times as many.
    """
    source: str
    """Origin of the numbers, for reports."""


DEVICE_RATES = {
    # Matmul and copy are as reported for this GPU. Attention is as published for the H100 with
    # FlashAttention 3 and cuDNN. The weakest assumption is the backward at head width 64: the
    # published non-causal rate, times the ratio of causal to non-causal at width 128.
    "H200": Rates(
        matmul=790e12,
        bandwidth=4.3e12,
        attention={
            64: {
                1024: (291e12, 200e12),
                2048: (371e12, 310e12),
                4096: (420e12, 383e12),
                8192: (460e12, 430e12),
                16384: (473e12, 448e12),
            },
            128: {
                1024: (423e12, 219e12),
                2048: (568e12, 370e12),
                4096: (667e12, 474e12),
                8192: (685e12, 541e12),
                16384: (690e12, 579e12),
            },
        },
        source="assumed from published rates",
    ),
    "H100": Rates(
        matmul=711e12,
        bandwidth=3.018e12,
        attention={
            64: {
                1024: (335e12, 231e12),
                2048: (400e12, 313e12),
                4096: (432e12, 376e12),
                8192: (448e12, 415e12),
            },
            128: {
                1024: (444e12, 286e12),
                2048: (524e12, 391e12),
                4096: (577e12, 455e12),
                8192: (611e12, 499e12),
            },
        },
        source="measured with cuDNN 9.19, at a power limit of 700 W",
    ),
}
"""Rates of known GPUs, by a word of the device's name."""


@dataclass(frozen=True)
class Bound:
    """The least seconds per token of each part of a training step."""

    matmul: float
    attention_forward: float
    attention_backward: float
    memory: dict[str, float]
    """Operators between the matmuls, by name."""
    optimizer: float

    @property
    def seconds_per_token(self) -> float:
        """Sum of all parts."""
        attention = self.attention_forward + self.attention_backward
        return self.matmul + attention + sum(self.memory.values()) + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        """The bound H."""
        return 1 / self.seconds_per_token


def bound(model: ModelConfig, tokens_per_update: int, rates: Rates) -> Bound:
    """The bound of bf16 training on one device with `rates`.

    `tokens_per_update` counts the tokens of this device only.
    """
    # Causal: QK^T and PV, each with 2 FLOPs for T/2 keys.
    forward_flops = 2 * model.n_layers * model.attention_width * model.max_seq_len
    forward, backward = attention_rates(rates, model.head_width, model.max_seq_len)
    return Bound(
        matmul=6 * matmul_parameters(model) / rates.matmul,
        attention_forward=forward_flops / forward,
        attention_backward=2.5 * forward_flops / backward,
        memory={
            operator: n_bytes / rates.bandwidth for operator, n_bytes in min_bytes(model).items()
        },
        optimizer=ADAMW_BYTES * n_parameters(model) / tokens_per_update / rates.bandwidth,
    )


def min_bytes(model: ModelConfig) -> dict[str, float]:
    """Fewest bytes per token, forward and backward in bf16, of the operators between the matmuls.

    Each operator is one fused kernel per direction. Recomputation is not counted. The loss reads
    the logits once and writes their gradient in place.
    """
    width, layers = model.n_embd, model.n_layers
    rotated = (model.n_heads + model.kv_heads) * model.head_width
    return {
        # Forward: read branch and residual stream, write sum and norm. Backward: read the sum and
        # the gradients of sum and norm, write the gradient of branch and residual stream.
        "rms_norm": (2 * layers * 16 + 16) * width,
        "rope": layers * 8 * rotated,
        "swiglu": layers * 16 * model.ffn_width,
        "cross_entropy": 4 * model.vocab_size,
        "embedding": 8 * width,
    }


def attention_rates(rates: Rates, head_dim: int, seq_len: int) -> tuple[float, float]:
    """Forward and backward FLOP/s, interpolated over the logarithm of `seq_len`.

    Uses the rates of the next larger known head width, or of the widest. A length outside of the
    known range gets the rates of the nearest known length.
    """
    widths = sorted(rates.attention)
    wide_enough = (width for width in widths if width >= head_dim)
    by_length = rates.attention[next(wide_enough, widths[-1])]
    lengths = sorted(by_length)
    seq_len = min(max(seq_len, lengths[0]), lengths[-1])
    below = max(length for length in lengths if length <= seq_len)
    above = min(length for length in lengths if length >= seq_len)
    share = 0.0 if below == above else math.log(seq_len / below) / math.log(above / below)
    forward, backward = (
        low + share * (high - low)
        for low, high in zip(by_length[below], by_length[above], strict=True)
    )
    return forward, backward
