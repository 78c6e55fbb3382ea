"""Benchmark of cross-entropy over materialised logits."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.operators.case import Benchmark, Operator, Provider, Shape, Work, ours, randn
from benchmarks.operators.peers import peers
from fastllama.config import ModelConfig
from fastllama_kernels import REFERENCE, TRITON


def _shape(model: ModelConfig, n_tokens: int) -> Shape:
    return {"N": n_tokens, "V": model.vocab_size}


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    logits = randn(generator, dtype, shape["N"], shape["V"])
    targets = torch.randint(shape["V"], (shape["N"],), generator=generator, device=generator.device)
    return logits, targets


def _work(shape: Shape, size: int) -> dict[str, Work]:
    moved = size * shape["N"] * shape["V"]
    # `both` is in place: the forward reads the logits once and writes their gradient once.
    return {"forward": Work(moved), "backward": Work(2 * moved), "both": Work(2 * moved)}


def _loss(operator: Operator, **options: bool) -> Operator:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return operator(logits, targets, **options)[0]

    return loss


BENCHMARKS = (
    Benchmark(
        operator="cross_entropy",
        shape=_shape,
        inputs=_inputs,
        reference=_loss(REFERENCE.cross_entropy),
        work=_work,
        # In place, each call reads the gradient left by the previous call as its logits.
        providers=lambda *_: [
            ours(partial(_loss, TRITON.cross_entropy)),
            Provider(
                "fastllama in place",
                "fastllama",
                partial(_loss, TRITON.cross_entropy, inplace=True),
                phases=("both",),
            ),
            *peers("cross_entropy"),
        ],
    ),
)
