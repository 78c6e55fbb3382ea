"""SwiGLU: h = silu(gate) * up, silu(x) = x * sigmoid(x); with a projection, out = h @ down^T.

    d gate = dh up sigmoid(gate) (1 + gate (1 - sigmoid(gate))),  d up = dh silu(gate)

Shapes: gate_up (..., I), I = 2F, packed with the gate first; h (..., F); down (D, F). Arithmetic is
in float32 (in the reference, float64 for float64), rounded once.
Saved for backward: gate_up, and down. The backward kernel recomputes h, unless it is saved.
Bytes, for N rows and b bytes per element: forward 3 N F b; backward 5 N F b, + N F b for h.
Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastllama_kernels._dtype import accumulation_dtype, autocast_like_linear, check_kernel_dtypes
from fastllama_kernels._library import register
from fastllama_kernels._linear import linear, weight_gradient
from fastllama_kernels._tile import row_and_columns


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up (..., F) of the packed `gate_up` (..., 2F), gate first."""
    # Converted by halves: compiled, the backward then writes no wide gradient of the whole.
    gate, up = (half.to(accumulation_dtype(gate_up)) for half in gate_up.chunk(2, dim=-1))
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu_linear_reference(
    gate_up: Tensor, down: Tensor, main_grad: Tensor | None = None
) -> Tensor:
    """Return swiglu(gate_up) @ down^T (..., D) of `gate_up` (..., 2F) and `down` (D, F).

    `main_grad` is that of `down`, as in _linear.py.
    """
    return linear(swiglu_reference(gate_up), down, main_grad)


def swiglu_cpu(gate_up: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch, for a CPU under torch.compile.

    The compiled backward of silu computes two exponentials, and that of sigmoid one.
    """
    gate, up = (half.to(accumulation_dtype(gate_up)) for half in gate_up.chunk(2, dim=-1))
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def swiglu_linear_cpu(gate_up: Tensor, down: Tensor, main_grad: Tensor | None = None) -> Tensor:
    """`swiglu_linear` in plain PyTorch, for a CPU under torch.compile."""
    return linear(swiglu_cpu(gate_up), down, main_grad)


@triton.jit
def _swiglu_fwd_kernel(gate_up_ptr, h_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = row_and_columns(F, BLOCK)
    mask = columns < F
    gate_up_ptr += row * 2 * F
    gate = tl.load(gate_up_ptr + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + F + columns, mask, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    tl.store(h_ptr + row * F + columns, h.to(h_ptr.dtype.element_ty), mask)


@triton.jit
def _swiglu_bwd_kernel(
    dh_ptr,
    gate_up_ptr,
    dgate_up_ptr,
    h_ptr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):
    row, columns = row_and_columns(F, BLOCK)
    mask = columns < F
    gate_up_ptr += row * 2 * F
    dgate_up_ptr += row * 2 * F
    gate = tl.load(gate_up_ptr + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + F + columns, mask, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + row * F + columns, mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dh * up * (sigmoid + silu * (1 - sigmoid))
    dtype: tl.constexpr = dgate_up_ptr.dtype.element_ty
    tl.store(dgate_up_ptr + columns, dgate.to(dtype), mask)
    tl.store(dgate_up_ptr + F + columns, (dh * silu).to(dtype), mask)
    if RECOMPUTE:
        h = (silu * up).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * F + columns, h, mask)


def launch_config(width: int) -> dict[str, int]:
    """Return the columns per program, 8 per thread, and warps."""
    block = min(triton.next_power_of_2(width), 1_024)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 4)}


def _fwd_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@register("swiglu_fwd(Tensor gate_up) -> Tensor", _fwd_fake)
def swiglu_fwd(gate_up: Tensor) -> Tensor:
    """Return h (..., F) of `gate_up` (..., 2F), in its dtype."""
    h = _fwd_fake(gate_up)
    width = h.shape[-1]
    config = launch_config(width)
    if h.numel():
        grid = h.numel() // width * triton.cdiv(width, config["BLOCK"])
        _swiglu_fwd_kernel[(grid,)](gate_up.contiguous(), h, F=width, **config)
    return h


def _bwd_fake(dh: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


@register("swiglu_bwd(Tensor dh, Tensor gate_up) -> Tensor", _bwd_fake)
def swiglu_bwd(dh: Tensor, gate_up: Tensor) -> Tensor:
    """Return the gradient of `gate_up` (..., 2F), in its dtype, from `dh` (..., F)."""
    dgate_up = _bwd_fake(dh, gate_up)
    _launch_bwd(dh, gate_up, dgate_up, h=None)
    return dgate_up


def _recompute_bwd_fake(dh: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return _bwd_fake(dh, gate_up), torch.empty_like(dh, memory_format=torch.contiguous_format)


@register(
    "swiglu_recompute_bwd(Tensor dh, Tensor gate_up) -> (Tensor, Tensor)", _recompute_bwd_fake
)
def swiglu_recompute_bwd(dh: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of `swiglu_bwd` and h (..., F) in the dtype of `dh`."""
    dgate_up, h = _recompute_bwd_fake(dh, gate_up)
    _launch_bwd(dh, gate_up, dgate_up, h)
    return dgate_up, h


def _launch_bwd(dh: Tensor, gate_up: Tensor, dgate_up: Tensor, h: Tensor | None) -> None:
    width = dh.shape[-1]
    config = launch_config(width)
    if dh.numel():
        grid = dh.numel() // width * triton.cdiv(width, config["BLOCK"])
        _swiglu_bwd_kernel[(grid,)](
            dh.contiguous(),
            gate_up.contiguous(),
            dgate_up,
            # Without RECOMPUTE the kernel ignores this pointer.
            dgate_up if h is None else h,
            F=width,
            RECOMPUTE=h is not None,
            **config,
        )


class _SwiGLU(torch.autograd.Function):
    """SwiGLU with an optional projection."""

    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, down: Tensor | None, main_grad: Tensor | None, save_h: bool
    ) -> Tensor:
        h = swiglu_fwd(gate_up)
        ctx.save_for_backward(gate_up, down, main_grad, h if save_h else None)
        return h if down is None else F.linear(h, down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, down, main_grad, h = ctx.saved_tensors
        if down is None:
            return swiglu_bwd(dout, gate_up), None, None, None
        if h is None:
            dgate_up, h = swiglu_recompute_bwd(dout @ down, gate_up)
        else:
            dgate_up = swiglu_bwd(dout @ down, gate_up)
        ddown = None
        if ctx.needs_input_grad[1]:
            ddown = weight_gradient(dout, h, main_grad)
        return dgate_up, ddown, None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up of a packed projection.

    Args:
        gate_up: (..., 2F), gate first; float32, bfloat16 or float16, any strides.

    Returns:
        (..., F) in the dtype of `gate_up`.

    Raises:
        ValueError: an odd last dimension, another dtype, or a tensor not on CUDA.
    """
    _check(gate_up)
    return _SwiGLU.apply(gate_up, None, None, False)


def swiglu_linear(
    gate_up: Tensor, down: Tensor, main_grad: Tensor | None = None, *, save_h: bool = False
) -> Tensor:
    """Return h @ down^T, h = swiglu(gate_up); `gate_up` is the only activation that it saves.

    Args:
        gate_up: (..., 2F), gate first; float32, bfloat16 or float16, any strides.
        down: (D, F), as in `torch.nn.Linear`; autocast applies to it.
        main_grad: float32 (D, F); the backward adds the gradient of `down` to it, as described in
            _linear.py.
        save_h: save h as well, N F b bytes, and do not recompute it. The bits are the same.

    Returns:
        (..., D).

    Raises:
        ValueError: shapes or dtypes that do not match, or tensors not on CUDA.
    """
    _check(gate_up)
    if down.ndim != 2 or 2 * down.shape[1] != gate_up.shape[-1]:
        raise ValueError(
            f"down has shape {tuple(down.shape)}, and needs (D, {gate_up.shape[-1] // 2})."
        )
    return _SwiGLU.apply(gate_up, autocast_like_linear(down), main_grad, save_h)


def _check(gate_up: Tensor) -> None:
    check_kernel_dtypes(gate_up=gate_up)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up has shape {tuple(gate_up.shape)}; its last dimension holds gate and up, so "
            "it must be even."
        )
