"""Benchmark of causal grouped-query attention with every backend that supports the shape."""

from functools import partial
from typing import Any

import torch

from benchmarks.operators.case import (
    Benchmark,
    Provider,
    Shape,
    Work,
    forward_and_backward,
    ours,
    randn,
    rows,
)
from fastllama.config import ModelConfig
from fastllama_kernels import REFERENCE
from fastllama_kernels.attention_backends import BACKENDS, AttentionShape
from fastllama_kernels.attention_choice import attention_operator, choose_attention


def _shape(model: ModelConfig, n_tokens: int) -> Shape:
    heads = {"H": model.n_heads, "G": model.kv_heads, "K": model.head_width}
    return rows(model, n_tokens) | heads


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    b, t, width = shape["B"], shape["T"], shape["K"]
    # Views of one packed projection, as in the model. Backends that need another layout pay for it.
    heads = (shape["H"], shape["G"], shape["G"])
    packed = randn(generator, dtype, b, t, sum(heads), width).detach()
    return tuple(x.requires_grad_() for x in packed.split(heads, dim=2))


def _work(shape: Shape, size: int) -> dict[str, Work]:
    # FlashAttention's count: two causal matmuls forward, five backward.
    flops = 2.0 * shape["B"] * shape["H"] * shape["T"] ** 2 * shape["K"]
    return forward_and_backward(Work(flops=flops), Work(flops=2.5 * flops))


def _providers(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Provider]:
    called_with = AttentionShape(
        batch_size=shape["B"],
        seq_len=shape["T"],
        n_heads=shape["H"],
        n_kv_heads=shape["G"],
        head_dim=shape["K"],
        dtype=dtype,
        device=device,
    )
    return [
        ours(lambda: attention_operator(choose_attention(called_with).name)),
        *(
            Provider(backend.name, "torch or flash-attn", partial(attention_operator, backend.name))
            for backend in BACKENDS
            if backend.unsupported_reason(called_with) is None
        ),
    ]


BENCHMARKS = (
    Benchmark(
        operator="attention",
        shape=_shape,
        inputs=_inputs,
        reference=REFERENCE.attention,
        work=_work,
        providers=_providers,
    ),
)
