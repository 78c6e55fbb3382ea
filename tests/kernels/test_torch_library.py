"""PyTorch's `opcheck` of every launcher: schema, mutation, fake tensors, torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library

import fastllama_kernels  # noqa: F401, registers the operators
from tests.compare import DEVICE, randn
from tests.kernels.layouts import every_other, transposed

B, T, D, F, V, K = 2, 3, 6, 10, 11, 4
HEADS = (3, 1)
LOSS_OPTIONS = (-100, 0.1, 0.01, 30.0)
Calls = dict[str, list[tuple[Any, ...]]]

REGISTERED = sorted(
    name.removeprefix("fastllama::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fastllama::")
)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, seed=0, dtype=dtype)


def integers(*shape: int, below: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), device=DEVICE).reshape(shape) % below


def norm(n_rows: int, dtype: torch.dtype) -> Calls:
    x, weight = numbers(n_rows, D, dtype=dtype), numbers(D, dtype=dtype)
    # A bfloat16 branch with a float32 stream.
    wide = x.float()
    backward = [(x, stream_gradient, wide, weight, 1e-5) for stream_gradient in (None, wide)]
    return {
        "rms_norm_fwd": [(x, weight, 1e-5)],
        "add_rms_norm_fwd": [(x, residual, weight, 1e-5) for residual in (x, wide)],
        "rms_norm_bwd": backward,
        "rms_norm_recompute_bwd": backward,
    }


def rope(n_rows: int, dtype: torch.dtype) -> Calls:
    n_heads, n_kv_heads = HEADS
    qkv = numbers(n_rows, T, (n_heads + 2 * n_kv_heads) * K, dtype=dtype)
    dq, dk = (numbers(n_rows, T, heads, K, dtype=dtype) for heads in HEADS)
    tables = numbers(T + 2, K // 2), numbers(T + 2, K // 2)
    positions = integers(n_rows, T, below=T + 2)
    return {
        "rope_": [(qkv, *tables, rows, *HEADS) for rows in (None, positions)],
        "rope_fwd": [(qkv, *tables, rows, *HEADS) for rows in (None, positions)],
        "rope_bwd": [(dq, dk, dk, *tables, rows) for rows in (None, positions)],
    }


def swiglu(n_rows: int, dtype: torch.dtype) -> Calls:
    gate_up, dh = numbers(n_rows, T, 2 * F, dtype=dtype), numbers(n_rows, T, F, dtype=dtype)
    return {
        "swiglu_fwd": [(gate_up,)],
        "swiglu_bwd": [(dh, gate_up)],
        "swiglu_recompute_bwd": [(dh, gate_up)],
    }


def cross_entropy(n_rows: int, dtype: torch.dtype) -> Calls:
    logits, targets = numbers(n_rows, V, dtype=dtype), integers(n_rows, below=V)
    hidden, weight = numbers(n_rows, D, dtype=dtype), numbers(V, D, dtype=dtype)
    per_row, n_valid = numbers(n_rows), torch.tensor(3, device=DEVICE)
    return {
        "cross_entropy_fwd": [(logits, targets, *LOSS_OPTIONS)],
        "cross_entropy_gradient_fwd_": [
            (logits, targets, count, *LOSS_OPTIONS) for count in (None, n_valid)
        ],
        "cross_entropy_bwd": [(per_row, per_row, logits, targets, per_row, per_row, *LOSS_OPTIONS)],
        "scale_": [(logits, per_row), (logits, torch.tensor(0.5, device=DEVICE))],
        "scaled": [
            (hidden, torch.tensor(0.5, device=DEVICE), wanted) for wanted in (dtype, torch.float32)
        ],
        "add_scaled_": [(numbers(V, D), weight, torch.tensor(0.5, device=DEVICE))],
        "linear_cross_entropy_fwd": [
            (hidden, weight, targets, *LOSS_OPTIONS, need_dhidden, need_dweight)
            for need_dhidden in (True, False)
            for need_dweight in (True, False)
        ],
    }


def linear(n_rows: int, dtype: torch.dtype) -> Calls:
    dout, x = numbers(n_rows, F, dtype=dtype), numbers(n_rows, D, dtype=dtype)
    return {"accumulate_matmul_": [(numbers(F, D), dout.T, x)]}


GROUPS: list[Callable[[int, torch.dtype], Calls]] = [
    linear,
    norm,
    rope,
    swiglu,
    cross_entropy,
]


def samples(n_rows: int = B, dtype: torch.dtype = torch.float32) -> Calls:
    """Arguments of every operator by name, with and without each optional argument."""
    return {name: calls for group in GROUPS for name, calls in group(n_rows, dtype).items()}


def written_to(name: str) -> bool:
    return "(a!)" in str(getattr(torch.ops.fastllama, name).default._schema)


def strided(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return every_other(x) if x.ndim == 1 else transposed(x)


def strided_call(name: str, call: tuple[Any, ...]) -> tuple[Any, ...]:
    """Strided arguments, except one that is written to, which must be contiguous."""
    first, *others = call
    return (first if written_to(name) else strided(first), *map(strided, others))


def strided_samples() -> Calls:
    return {name: [strided_call(name, call) for call in calls] for name, calls in samples().items()}


VARIANTS = {
    "bfloat16": lambda: samples(dtype=torch.bfloat16),
    "no rows": lambda: samples(n_rows=0),
    "strided": strided_samples,
}


def test_every_operator_has_samples() -> None:
    assert sorted(samples()) == REGISTERED


@pytest.mark.parametrize("name", REGISTERED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant: str, name: str) -> None:
    for call in VARIANTS[variant]()[name]:
        library.opcheck(getattr(torch.ops.fastllama, name).default, call)


@pytest.mark.parametrize("name", [name for name in REGISTERED if not written_to(name)])
def test_strided_inputs(name: str) -> None:
    operator = getattr(torch.ops.fastllama, name)
    for plain, call in zip(samples()[name], strided_samples()[name], strict=True):
        expected, results = operator(*plain), operator(*call)
        if isinstance(results, Tensor):
            expected, results = (expected,), (results,)
        for result, plain_result in zip(results, expected, strict=True):
            assert result.is_contiguous()
            torch.testing.assert_close(result, plain_result)
