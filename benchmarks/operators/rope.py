"""Benchmark of rotary embeddings on the packed projection of queries, keys and values."""

from typing import Any

import torch

from benchmarks.operators.case import (
    Benchmark,
    Shape,
    Work,
    forward_and_backward,
    ours,
    randn,
    rows,
)
from benchmarks.operators.peers import peers
from fastllama.config import ModelConfig
from fastllama_kernels import REFERENCE, TRITON


def _shape(model: ModelConfig, n_tokens: int) -> Shape:
    heads = {"H": model.n_heads, "G": model.kv_heads, "K": model.head_width}
    return rows(model, n_tokens) | heads


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    n_heads, n_kv_heads, width = shape["H"], shape["G"], shape["K"]
    packed = (n_heads + 2 * n_kv_heads) * width
    qkv = randn(generator, dtype, shape["B"], shape["T"], packed)
    # Random angles exercise every value; the timing does not depend on them.
    angles = torch.rand(shape["T"], width // 2, generator=generator, device=generator.device)
    return qkv, angles.cos(), angles.sin(), n_heads, n_kv_heads


def _work(shape: Shape, size: int) -> dict[str, Work]:
    moved = size * shape["B"] * shape["T"] * shape["K"]
    n_heads, n_kv_heads = shape["H"], shape["G"]
    return forward_and_backward(
        Work(2 * moved * (n_heads + n_kv_heads)), Work(2 * moved * (n_heads + 2 * n_kv_heads))
    )


BENCHMARKS = (
    Benchmark(
        operator="rope",
        shape=_shape,
        inputs=_inputs,
        reference=REFERENCE.rope,
        work=_work,
        # In place: each call rotates the output of the previous call.
        providers=lambda *_: [ours(lambda: TRITON.rope), *peers("rope")],
    ),
)
