"""The bound H of a training step: the least time it can take on one device, part by part.

    H = 1 / (matmul + attention + memory + optimizer), seconds a token of each

Each part is alone on the device at a rate that its best kernel reaches, so no schedule of these
kernels is faster. Matrix products run at the rate of a large one; attention at the rate of the best
kernel for its head width and length; everything else moves the fewest bytes that one well-fused
kernel each can move, at the bandwidth of a copy. Recomputation is not in it.
"""

import math
from dataclasses import dataclass

from fastllama.config import ModelConfig
from fastllama.planning.flops import matmul_parameters, n_parameters

ADAMW_BYTES = 28
"""A parameter and update: gradient bf16, weight and two moments float32 read; these three written
again, and the weight in bf16."""


@dataclass(frozen=True)
class Rates:
    """What one device reaches at best."""

    matmul: float
    """FLOP/s of a large bf16 matrix product of random numbers."""
    bandwidth: float
    """Bytes/s of a device copy, read and written bytes together."""
    attention: dict[int, dict[int, tuple[float, float]]]
    """FLOP/s of causal attention, forward and backward, by head width and sequence length.

    A forward counts 2 T^2 K a head, a backward 2.5 times that.
    """
    source: str
    """Where the numbers are from."""


_HOPPER_ATTENTION = {
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
}
# Assumptions until the GPU suite has measured them: the matrix product and the copy as reported for
# these GPUs, attention as published for the H100 with FlashAttention 3 and cuDNN. The backward at
# width 64 is the weakest: the published non-causal rate times the causal share seen at width 128.
ASSUMED_RATES = {
    "H200": Rates(790e12, 4.3e12, _HOPPER_ATTENTION, "assumed for the H200, from published rates"),
    "H100": Rates(790e12, 3.0e12, _HOPPER_ATTENTION, "assumed for the H100, from published rates"),
}


@dataclass(frozen=True)
class Bound:
    """Seconds a token of every part of a training step, at best."""

    matmul: float
    attention_forward: float
    attention_backward: float
    memory: dict[str, float]
    """Of everything between the products, by operator."""
    optimizer: float

    @property
    def seconds_per_token(self) -> float:
        """All parts, one after the other."""
        attention = self.attention_forward + self.attention_backward
        return self.matmul + attention + sum(self.memory.values()) + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        """H."""
        return 1 / self.seconds_per_token


def bound(model: ModelConfig, tokens_per_update: int, rates: Rates) -> Bound:
    """The bound of training `model` in bf16 on one device with `rates`."""
    n_attended = model.n_layers * model.n_embd * model.max_seq_len
    forward, backward = attention_rates(rates, model.head_dim, model.max_seq_len)
    return Bound(
        matmul=6 * matmul_parameters(model) / rates.matmul,
        attention_forward=2 * n_attended / forward,
        attention_backward=5 * n_attended / backward,
        memory={
            operator: n_bytes / rates.bandwidth for operator, n_bytes in fewest_bytes(model).items()
        },
        optimizer=ADAMW_BYTES * n_parameters(model) / tokens_per_update / rates.bandwidth,
    )


def fewest_bytes(model: ModelConfig) -> dict[str, float]:
    """Bytes a token, forward and backward in bf16, of the operators between the products.

    Those of the kernels' own docstrings, without what is computed again to save memory. The loss
    reads and writes the logits once, in place.
    """
    width, layers = model.n_embd, model.n_layers
    rotated = (model.n_heads + model.kv_heads) * model.head_dim
    return {
        # Forward: branch and stream read, sum and norm written; backward the same of gradients.
        "rms_norm": (2 * layers * 16 + 16) * width,
        "rope": layers * 8 * rotated,
        "swiglu": layers * 16 * model.ffn_hidden,
        "cross_entropy": 4 * model.vocab_size,
        "embedding": 8 * width,
    }


def attention_rates(rates: Rates, head_dim: int, seq_len: int) -> tuple[float, float]:
    """Forward and backward FLOP/s, interpolated over the logarithm of the length.

    Of the next known head width, or of the widest.
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
