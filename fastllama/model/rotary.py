"""Rotary position tables, with the frequency scaling of Llama 3."""

import math

import torch
from torch import Tensor

from fastllama.config import ModelConfig


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, each (P, R) float64, P = max_seq_len.

    float32 would round the angles of far positions.
    """
    positions = torch.arange(config.max_seq_len, dtype=torch.float64)
    angles_PR = torch.outer(positions, rope_frequencies(config))
    return angles_PR.cos(), angles_PR.sin()


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle in radians that one position rotates each pair by, (R,) float64.

    theta^(-2i/K) for pair i. With `rope_scaling_factor` the scaling of Llama 3.1 applies
    (https://arxiv.org/abs/2407.21783). It divides the frequencies of wavelengths above context /
    low_freq_factor by the factor, keeps those of wavelengths below context / high_freq_factor, and
    interpolates between.
    """
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float64) / config.head_width
    frequencies = config.theta**-exponents
    if config.rope_scaling_factor == 1.0:
        return frequencies
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    rotations = config.rope_original_max_seq_len * frequencies / (2 * math.pi)
    unscaled = ((rotations - low) / (high - low)).clamp(0, 1)
    return frequencies * (unscaled + (1 - unscaled) / config.rope_scaling_factor)
