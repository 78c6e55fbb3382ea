"""Benchmarks of SwiGLU: alone, and with the projection that follows."""

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
    return rows(model, n_tokens) | {"F": model.ffn_width}


def _projected(model: ModelConfig, n_tokens: int) -> Shape:
    return _shape(model, n_tokens) | {"D": model.n_embd}


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    return (randn(generator, dtype, shape["B"], shape["T"], 2 * shape["F"]),)


def _inputs_with_projection(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Any, ...]:
    down = randn(generator, dtype, shape["D"], shape["F"])
    return *_inputs(shape, dtype, generator), down


def _hidden(shape: Shape) -> int:
    return shape["B"] * shape["T"] * shape["F"]


def _work(shape: Shape, size: int) -> dict[str, Work]:
    moved = size * _hidden(shape)
    return forward_and_backward(Work(3 * moved), Work(5 * moved))


def _work_with_projection(shape: Shape, size: int) -> dict[str, Work]:
    moved, flops = size * _hidden(shape), 2.0 * _hidden(shape) * shape["D"]
    return forward_and_backward(Work(3 * moved, flops), Work(6 * moved, 2 * flops))


BENCHMARKS = (
    Benchmark(
        operator="swiglu",
        shape=_shape,
        inputs=_inputs,
        reference=REFERENCE.swiglu,
        work=_work,
        providers=lambda *_: [ours(lambda: TRITON.swiglu), *peers("swiglu")],
    ),
    Benchmark(
        operator="swiglu_linear",
        shape=_projected,
        inputs=_inputs_with_projection,
        reference=REFERENCE.swiglu_linear,
        work=_work_with_projection,
        providers=lambda *_: [
            ours(lambda: TRITON.swiglu_linear),
            *peers("swiglu_linear"),
        ],
    ),
)
