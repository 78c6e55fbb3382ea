"""RMSNorm: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps), over the last dimension.

With a residual stream: stream = x + residual, y = rms_norm(stream), y in the dtype of x. With a
projection: out = y @ projection^T; the backward recomputes y, unless it is saved.

    d stream = rstd * (w dy - x_hat mean(x_hat w dy)) + d stream_out
    d weight = sum(dy x_hat),  x_hat = x * rstd

Shapes: x, residual, y (..., D), float32, bfloat16 or float16, any strides (copied if not
contiguous); weight (D,); projection (out_features, D). Arithmetic is in float32 (in the reference,
float64 for float64), rounded once at the end. Not included: Hugging Face's second rounding before
the weight, and Gemma's weight + 1.
Saved for backward: the stream (N, D) and the weights, and y (N, D) where asked for. The backward
computes rstd again, from rows that it reads anyway.
Bytes, for N rows and b bytes per element: forward 2 N D b, with a residual 4 N D b; backward
3 N D b, + N D b if the stream has a gradient, + N D b to recompute y. Rows of more than 16,384
elements (forward) or 8,192 (backward) are read twice: N D b more, or 2 N D b, unless the L2 cache
holds the rows of all programs that run.
Each program sums the weight gradient over its rows; a second kernel sums over programs, in a fixed
order. No atomics.
Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastllama_kernels._dtype import accumulation_dtype, autocast_like_linear, check_kernel_dtypes
from fastllama_kernels._library import n_multiprocessors, register
from fastllama_kernels._linear import linear, weight_gradient


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` (..., D) and scale it by `weight` (D,)."""
    wide = x.to(accumulation_dtype(x))
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add `x` to the `residual` stream, both (..., D); return (normalised sum, sum).

    `residual=None` starts the stream with `x`.
    """
    residual = x if residual is None else residual + x
    return rms_norm_reference(residual, weight, eps).to(x.dtype), residual


def add_rms_norm_linear_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    projection: Tensor,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Project the normalised sum of `add_rms_norm`; return (out (..., out_features), sum).

    `main_grad` is that of `projection`, as in _linear.py.
    """
    y, residual = add_rms_norm_reference(x, residual, weight, eps)
    return linear(y, projection, main_grad), residual


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    stream_ptr,
    D: tl.constexpr,
    eps: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * D
    y_ptr += row * D
    residual_ptr += row * D
    stream_ptr += row * D
    columns = tl.arange(0, BLOCK)
    if D <= BLOCK:
        mask = columns < D
        s = tl.load(x_ptr + columns, mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            s += tl.load(residual_ptr + columns, mask, other=0.0).to(tl.float32)
            rounded = s.to(stream_ptr.dtype.element_ty)
            tl.store(stream_ptr + columns, rounded, mask)
            # Normalise the rounded stream, which the backward reads.
            s = rounded.to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(s * s) / D + eps)
        tl.store(y_ptr + columns, (s * rstd * weight).to(y_ptr.dtype.element_ty), mask)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, D, BLOCK):
            mask = start + columns < D
            s = tl.load(x_ptr + start + columns, mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                s += tl.load(residual_ptr + start + columns, mask, other=0.0).to(tl.float32)
                rounded = s.to(stream_ptr.dtype.element_ty)
                tl.store(stream_ptr + start + columns, rounded, mask)
                s = rounded.to(tl.float32)
            squares += s * s
        rstd = tl.rsqrt(tl.sum(squares) / D + eps)
        for start in range(0, D, BLOCK):
            mask = start + columns < D
            # This program wrote the stream above; the sum between the loops is a barrier.
            if HAS_RESIDUAL:
                s = tl.load(stream_ptr + start + columns, mask, other=0.0).to(tl.float32)
            else:
                s = tl.load(x_ptr + start + columns, mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + start + columns, mask, other=0.0).to(tl.float32)
            y = (s * rstd * weight).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + start + columns, y, mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,
    dstream_ptr,
    stream_ptr,
    weight_ptr,
    dx_ptr,
    y_ptr,
    dweight_ptr,
    n_rows,
    D: tl.constexpr,
    eps: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DSTREAM: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # int64 makes the loop's `row` int64 too, so row * D does not overflow.
    program = tl.program_id(0).to(tl.int64)
    n_programs = tl.num_programs(0)
    dweight_ptr += program * D
    columns = tl.arange(0, BLOCK)
    if D <= BLOCK:
        mask = columns < D
        weight = tl.load(weight_ptr + columns, mask, other=0.0).to(tl.float32)
        dweight = tl.zeros((BLOCK,), tl.float32)
        # This num_stages prefetches the next rows; the launch option num_stages pipelines only
        # loops around `tl.dot`.
        for row in tl.range(program, n_rows, n_programs, num_stages=NUM_STAGES):
            offsets = row * D + columns
            s = tl.load(stream_ptr + offsets, mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + offsets, mask, other=0.0).to(tl.float32)
            wdy = dy * weight
            squares, products = tl.sum(s * s), tl.sum(s * wdy)
            rstd = tl.rsqrt(squares / D + eps)
            x_hat = s * rstd
            dweight += dy * x_hat
            dx = rstd * (wdy - x_hat * (rstd * products / D))
            if HAS_DSTREAM:
                dx += tl.load(dstream_ptr + offsets, mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask)
            if RECOMPUTE:
                tl.store(y_ptr + offsets, (x_hat * weight).to(y_ptr.dtype.element_ty), mask)
        tl.store(dweight_ptr + columns, dweight, mask)
    else:
        for row in range(program, n_rows, n_programs):
            offset = row * D
            squares = tl.zeros((BLOCK,), tl.float32)
            products = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, D, BLOCK):
                mask = start + columns < D
                offsets = offset + start + columns
                s = tl.load(stream_ptr + offsets, mask, other=0.0).to(tl.float32)
                dy = tl.load(dy_ptr + offsets, mask, other=0.0).to(tl.float32)
                weight = tl.load(weight_ptr + start + columns, mask, other=0.0).to(tl.float32)
                squares += s * s
                products += s * (dy * weight)
            rstd = tl.rsqrt(tl.sum(squares) / D + eps)
            mean = rstd * tl.sum(products) / D
            for start in range(0, D, BLOCK):
                mask = start + columns < D
                offsets = offset + start + columns
                s = tl.load(stream_ptr + offsets, mask, other=0.0).to(tl.float32)
                dy = tl.load(dy_ptr + offsets, mask, other=0.0).to(tl.float32)
                weight = tl.load(weight_ptr + start + columns, mask, other=0.0).to(tl.float32)
                x_hat = s * rstd
                dx = rstd * (dy * weight - x_hat * mean)
                if HAS_DSTREAM:
                    dx += tl.load(dstream_ptr + offsets, mask, other=0.0).to(tl.float32)
                tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask)
                if RECOMPUTE:
                    tl.store(y_ptr + offsets, (x_hat * weight).to(y_ptr.dtype.element_ty), mask)
                # The launcher zeroed this program's sum over rows.
                dweight = tl.load(dweight_ptr + start + columns, mask, other=0.0)
                tl.store(dweight_ptr + start + columns, dweight + dy * x_hat, mask)


@triton.jit
def _rms_norm_dweight_kernel(
    partial_ptr,
    dweight_ptr,
    n_programs,
    D: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sum `partial` (n_programs, D) over programs, into `dweight` (D,) in its dtype."""
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    programs = tl.arange(0, BLOCK_PROGRAMS)
    mask = (columns < D)[None, :]
    total = tl.zeros((BLOCK_PROGRAMS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, n_programs, BLOCK_PROGRAMS):
        offsets = (start + programs)[:, None] * D + columns[None, :]
        total += tl.load(
            partial_ptr + offsets, mask & (start + programs < n_programs)[:, None], other=0.0
        )
    dweight = tl.sum(total, 0).to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + columns, dweight, columns < D)


def forward_config(width: int) -> dict[str, int]:
    """Return block and warps of the forward: 16 elements per thread, a loop over wider rows."""
    block = min(triton.next_power_of_2(width), 16_384)
    return {"BLOCK": block, "num_warps": max(block // 512, 1)}


def backward_config(width: int) -> dict[str, int]:
    """Return block, warps and pipeline stages of the backward.

    A thread has 8 elements, one 16-byte load in 16-bit dtypes. Rows of up to 8,192 elements stay
    in registers; a loop covers wider rows.
    """
    block = triton.next_power_of_2(width) if width <= 8_192 else 4_096
    return {"BLOCK": block, "num_warps": max(block // 256, 1), "NUM_STAGES": 3}


def dweight_config(width: int) -> dict[str, int]:
    """Return blocks and warps of the sum over programs: 16 elements per thread.

    A row of 8 columns is one sector of 32 bytes. There are up to 128 programs, one for about each
    multiprocessor.
    """
    columns = max(8, triton.next_power_of_2(triton.cdiv(width, 128)))
    return {
        "BLOCK_COLUMNS": columns,
        "BLOCK_PROGRAMS": max(1, 4_096 // columns),
        "num_warps": 8,
    }


def programs_per_multiprocessor(width: int) -> int:
    """Return how many programs of the persistent backward fit in one multiprocessor's registers."""
    return max(1, min(32, 8_192 // max(1, triton.next_power_of_2(width))))


def _fwd_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _like(x)


@register("rms_norm_fwd(Tensor x, Tensor weight, float eps) -> Tensor", _fwd_fake)
def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return y, shaped like `x` (..., D)."""
    y = _fwd_fake(x, weight, eps)
    x = x.contiguous()
    # Without a residual the kernel ignores the second x and the second y.
    _launch_fwd(x, x, weight, y, y, eps, has_residual=False)
    return y


def _add_fwd_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x, torch.promote_types(x.dtype, residual.dtype))


@register(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_fwd_fake,
)
def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return y like `x` (..., D), and the stream in the wider dtype."""
    y, stream = _add_fwd_fake(x, residual, weight, eps)
    residual = residual.contiguous()
    _launch_fwd(x.contiguous(), residual, weight, y, stream, eps, has_residual=True)
    return y, stream


def _launch_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    y: Tensor,
    stream: Tensor,
    eps: float,
    *,
    has_residual: bool,
) -> None:
    if x.numel():
        _rms_norm_fwd_kernel[(x.numel() // x.shape[-1],)](
            x,
            residual,
            weight.contiguous(),
            y,
            stream,
            D=x.shape[-1],
            eps=eps,
            HAS_RESIDUAL=has_residual,
            **forward_config(x.shape[-1]),
        )


def _bwd_fake(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _like(stream), torch.empty_like(weight, memory_format=torch.contiguous_format)


@register(
    "rms_norm_bwd(Tensor dy, Tensor? dstream, Tensor stream, Tensor weight, float eps)"
    " -> (Tensor, Tensor)",
    _bwd_fake,
)
def rms_norm_bwd(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the stream (..., D) and of the weight (D,), in their dtypes."""
    dx = _like(stream)
    return dx, _launch_bwd(dy, dstream, stream, weight, eps, dx, y=None)


def _recompute_bwd_fake(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (*_bwd_fake(dy, dstream, stream, weight, eps), _like(dy))


@register(
    "rms_norm_recompute_bwd(Tensor dy, Tensor? dstream, Tensor stream, Tensor weight, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _recompute_bwd_fake,
)
def rms_norm_recompute_bwd(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of `rms_norm_bwd` and y (..., D) in the dtype of `dy`."""
    dx, y = _like(stream), _like(dy)
    return dx, _launch_bwd(dy, dstream, stream, weight, eps, dx, y), y


def _launch_bwd(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    eps: float,
    dx: Tensor,
    y: Tensor | None,
) -> Tensor:
    """Fill `dx` and `y`; return the gradient of the weight."""
    width = stream.shape[-1]
    n_rows = stream.shape[:-1].numel()
    config = backward_config(width)
    max_programs = n_multiprocessors(stream.device) * programs_per_multiprocessor(width)
    shape = (min(n_rows, max_programs), width)
    partial = stream.new_empty(shape, dtype=torch.float32)
    if width > config["BLOCK"]:
        partial.zero_()
    if stream.numel():
        _rms_norm_bwd_kernel[shape[:1]](
            dy.contiguous(),
            dy if dstream is None else dstream.contiguous(),
            stream.contiguous(),
            weight.contiguous(),
            dx,
            dx if y is None else y,
            partial,
            n_rows,
            D=width,
            eps=eps,
            HAS_DSTREAM=dstream is not None,
            RECOMPUTE=y is not None,
            **config,
        )
    dweight = _like(weight)
    config = dweight_config(width)
    grid = (triton.cdiv(width, config["BLOCK_COLUMNS"]),)
    _rms_norm_dweight_kernel[grid](partial, dweight, len(partial), D=width, **config)
    return dweight


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with an optional residual stream and an optional projection."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        projection: Tensor | None,
        main_grad: Tensor | None,
        save_y: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            stream = x
            y = rms_norm_fwd(x, weight, eps)
        else:
            y, stream = add_rms_norm_fwd(x, residual, weight, eps)
        ctx.save_for_backward(stream, weight, projection, main_grad, y if save_y else None)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
        out = y if projection is None else F.linear(y, projection)
        return out if residual is None else (out, stream)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dstream: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        stream, weight, projection, main_grad, y = ctx.saved_tensors
        x_dtype, residual_dtype = ctx.dtypes
        dx, dweight, dprojection = dstream, None, None
        if dout is not None and projection is None:
            dx, dweight = rms_norm_bwd(dout, dstream, stream, weight, ctx.eps)
        elif dout is not None:
            dy = dout @ projection
            if y is None:
                dx, dweight, y = rms_norm_recompute_bwd(dy, dstream, stream, weight, ctx.eps)
            else:
                dx, dweight = rms_norm_bwd(dy, dstream, stream, weight, ctx.eps)
            if ctx.needs_input_grad[4]:
                dprojection = weight_gradient(dout, y, main_grad)
        if dx is None:
            return None, None, None, None, None, None, None
        dresidual = None if residual_dtype is None else dx.to(residual_dtype)
        return dx.to(x_dtype), dresidual, dweight, None, dprojection, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` (..., D) and scale it by `weight` (D,).

    Args:
        x: (..., D) float32, bfloat16 or float16, any strides.
        weight: (D,), any of these dtypes.
        eps: added to the mean square.

    Returns:
        (..., D) in the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes that do not match, or tensors not on CUDA.
    """
    _check(x, None, weight)
    y: Tensor = _RMSNorm.apply(x, None, weight, eps, None, None, False)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add `x` to the `residual` stream and normalise the sum.

    Args:
        x: (..., D) float32, bfloat16 or float16, any strides.
        residual: the stream, shaped like `x`; None starts the stream with `x`.
        weight: (D,).
        eps: added to the mean square.

    Returns:
        The normalised sum (..., D) in the dtype of `x`, and the sum (..., D) in the wider dtype
        of `x` and `residual`.

    Raises:
        ValueError: shapes or dtypes that do not match, or tensors not on CUDA.
    """
    _check(x, residual, weight)
    return _apply(x, residual, weight, eps, None, None, False)


def add_rms_norm_linear(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    projection: Tensor,
    main_grad: Tensor | None = None,
    *,
    save_y: bool = False,
) -> tuple[Tensor, Tensor]:
    """Project the normalised sum y of `add_rms_norm`; the sum is its only saved activation.

    Args:
        x: (..., D) float32, bfloat16 or float16, any strides.
        residual: the stream, shaped like `x`; None starts the stream with `x`.
        weight: (D,), of the norm.
        eps: added to the mean square.
        projection: (out_features, D), as in `torch.nn.Linear`; autocast applies to it.
        main_grad: float32, shaped like `projection`; the backward adds its gradient to it, as
            described in _linear.py.
        save_y: save y as well, N D b bytes, and do not recompute it. The bits are the same.

    Returns:
        The projected normalised sum (..., out_features), and the sum (..., D).

    Raises:
        ValueError: shapes or dtypes that do not match, or tensors not on CUDA.
    """
    _check(x, residual, weight)
    if projection.shape[1:] != weight.shape:
        raise ValueError(
            f"projection has shape {tuple(projection.shape)}, and needs "
            f"(out_features, {x.shape[-1]})."
        )
    projection = autocast_like_linear(projection)
    return _apply(x, residual, weight, eps, projection, main_grad, save_y)


def _apply(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *options: Tensor | bool | None
) -> tuple[Tensor, Tensor]:
    """`options` are the weight of the projection, its main_grad, and whether to save y."""
    if residual is None:
        return _RMSNorm.apply(x, None, weight, eps, *options), x
    out, stream = _RMSNorm.apply(x, residual, weight, eps, *options)
    return out, stream


def _check(x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    check_kernel_dtypes(x=x, weight=weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, and rows of x, which has shape "
            f"{tuple(x.shape)}, need {tuple(x.shape[-1:])}."
        )
    if residual is not None:
        check_kernel_dtypes(residual=residual)
        if residual.shape != x.shape:
            raise ValueError(
                f"residual has shape {tuple(residual.shape)} and x {tuple(x.shape)}; both are "
                "added, so the shapes must be equal."
            )
