"""Benchmarks of RMSNorm: alone, with the residual add, and with the projection that follows."""

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

EPS = 1e-5


def _shape(model: ModelConfig, n_tokens: int) -> Shape:
    return rows(model, n_tokens) | {"D": model.n_embd}


def _projected(model: ModelConfig, n_tokens: int) -> Shape:
    width = (model.n_heads + 2 * model.kv_heads) * model.head_width
    return _shape(model, n_tokens) | {"E": width}


def _activations(shape: Shape) -> int:
    return shape["B"] * shape["T"] * shape["D"]


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    b, t, d = shape["B"], shape["T"], shape["D"]
    return randn(generator, dtype, b, t, d), randn(generator, dtype, d), EPS


def _inputs_with_residual(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Any, ...]:
    x, weight, eps = _inputs(shape, dtype, generator)
    return x, randn(generator, dtype, *x.shape), weight, eps


def _inputs_with_projection(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Any, ...]:
    projection = randn(generator, dtype, shape["E"], shape["D"])
    return *_inputs_with_residual(shape, dtype, generator), projection


def _work(shape: Shape, size: int) -> dict[str, Work]:
    moved = size * _activations(shape)
    return forward_and_backward(Work(2 * moved), Work(3 * moved))


def _work_with_residual(shape: Shape, size: int) -> dict[str, Work]:
    moved = size * _activations(shape)
    return forward_and_backward(Work(4 * moved), Work(4 * moved))


def _work_with_projection(shape: Shape, size: int) -> dict[str, Work]:
    moved = size * _activations(shape)
    flops = 2.0 * _activations(shape) * shape["E"]
    return forward_and_backward(Work(4 * moved, flops), Work(5 * moved, 2 * flops))


BENCHMARKS = (
    Benchmark(
        operator="rms_norm",
        shape=_shape,
        inputs=_inputs,
        reference=REFERENCE.rms_norm,
        work=_work,
        providers=lambda *_: [ours(lambda: TRITON.rms_norm), *peers("rms_norm")],
    ),
    Benchmark(
        operator="add_rms_norm",
        shape=_shape,
        inputs=_inputs_with_residual,
        reference=REFERENCE.add_rms_norm,
        work=_work_with_residual,
        providers=lambda *_: [
            ours(lambda: TRITON.add_rms_norm),
            *peers("add_rms_norm"),
        ],
    ),
    Benchmark(
        operator="add_rms_norm_linear",
        shape=_projected,
        inputs=_inputs_with_projection,
        reference=REFERENCE.add_rms_norm_linear,
        work=_work_with_projection,
        providers=lambda *_: [
            ours(lambda: TRITON.add_rms_norm_linear),
            *peers("add_rms_norm_linear"),
        ],
    ),
)
