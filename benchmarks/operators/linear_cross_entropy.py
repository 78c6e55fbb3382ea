"""Benchmark of the fused output projection and loss."""

from typing import Any

import torch

from benchmarks.operators.case import Benchmark, Shape, Work, ours, randn
from benchmarks.operators.peers import peers
from fastllama.config import ModelConfig
from fastllama_kernels import REFERENCE, TRITON


def _shape(model: ModelConfig, n_tokens: int) -> Shape:
    return {"N": n_tokens, "V": model.vocab_size, "D": model.n_embd}


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    n, v, d = shape["N"], shape["V"], shape["D"]
    hidden = randn(generator, dtype, n, d)
    # Scaled like trained weights, so that logits are of the order of 1.
    weight = (randn(generator, dtype, v, d).detach() * d**-0.5).requires_grad_()
    targets = torch.randint(v, (n,), generator=generator, device=generator.device)
    return hidden, weight, targets


def _work(shape: Shape, size: int) -> dict[str, Work]:
    n, v, d = shape["N"], shape["V"], shape["D"]
    # Some providers compute the gradients in the forward, so only `both` is comparable.
    moved = 2 * n * v * size + 2 * n * d * size + v * d * (4 + size)
    return {"both": Work(moved, 6.0 * n * v * d)}


BENCHMARKS = (
    Benchmark(
        operator="linear_cross_entropy",
        shape=_shape,
        inputs=_inputs,
        reference=REFERENCE.linear_cross_entropy,
        work=_work,
        providers=lambda *_: [
            ours(lambda: TRITON.linear_cross_entropy),
            *peers("linear_cross_entropy"),
        ],
    ),
)
