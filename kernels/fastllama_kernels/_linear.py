"""Linear projection whose matmul can add the weight gradient to a sum over micro-batches.

Forward: x @ weight^T. Backward: dx = dout @ weight, dweight = dout^T @ x. With `main_grad` the
second matmul adds to it, in float32 and in place: dweight is neither rounded to the dtype of x, nor
written, read and added in a pass of its own. Autograd gets no gradient of the weight then.

Shapes: x (..., in_features), weight (out_features, in_features), main_grad like weight, float32
(float64 for float64 weights). Not included: a bias.
Saved for backward: x and weight.
Bytes of the weight gradient, for each of its elements: 8 with `main_grad`; 12 for a bfloat16
gradient that autograd returns and a float32 sum that it is added to.
Source: `gradient_accumulation_fusion` of Megatron-LM, Narayanan et al. 2021,
https://arxiv.org/abs/2104.04473.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastllama_kernels._dtype import autocast_like_linear
from fastllama_kernels._library import register


def _accumulate_fake(total: Tensor, a: Tensor, b: Tensor) -> None:
    return None


@register(
    "accumulate_matmul_(Tensor(a!) total, Tensor a, Tensor b) -> ()",
    _accumulate_fake,
    uses_triton=False,
)
def accumulate_matmul_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, as `add_matmul` does. In a graph, one node that writes in place."""
    add_matmul(total, a, b)


def add_matmul(total: Tensor, a: Tensor, b: Tensor, *, beta: int = 1) -> None:
    """Set `total` to beta * total + a @ b in its dtype; `a` (M, K), `b` (K, N) may be narrower.

    On a CPU, `a` and `b` are copied to the dtype of `total`: PyTorch has no matmul there whose
    result is wider than its arguments.
    """
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def weight_gradient(dout: Tensor, x: Tensor, main_grad: Tensor | None) -> Tensor | None:
    """Return dout^T @ x, or None after adding it to `main_grad`.

    `dout` is (..., out_features) and `x` is (..., in_features); the result is
    (out_features, in_features) in their dtype.
    """
    dout_ON, x_NI = dout.reshape(-1, dout.shape[-1]).T, x.reshape(-1, x.shape[-1])
    if main_grad is None:
        return dout_ON @ x_NI
    accumulate_matmul_(main_grad, dout_ON, x_NI)
    return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, main_grad)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, main_grad = ctx.saved_tensors
        needs_dx, needs_dweight, _ = ctx.needs_input_grad
        dx = dout @ weight if needs_dx else None
        dweight = weight_gradient(dout, x, main_grad) if needs_dweight else None
        return dx, dweight, None


def can_pack(weight: Tensor) -> bool:
    """Whether `pack_weight` takes this weight here."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    is_bfloat16 = weight.dtype == torch.bfloat16
    return weight.dtype == torch.float32 or (
        is_bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_weight(weight: Tensor) -> Tensor:
    """A copy of `weight` (out_features, in_features) as oneDNN's matmul reads it, for `linear`.

    On a CPU, `F.linear` brings the weight into this order in each call. With few rows of x, as in
    decoding, this takes longer than the matmul. Only `linear_add` takes the copy as well.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return packed


def linear(x: Tensor, weight: Tensor, main_grad: Tensor | None = None) -> Tensor:
    """Return x @ weight^T; the backward adds the gradient of `weight` to `main_grad` if given.

    Args:
        x: (..., in_features), any float dtype, any device.
        weight: (out_features, in_features), same dtype; autocast applies to both. Or the result of
            `pack_weight`, outside of autocast and without a backward.
        main_grad: float32 sum of gradients, shaped like `weight`.

    Returns:
        (..., out_features).
    """
    out: Tensor
    if weight.is_mkldnn:
        out = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
        return out
    if main_grad is None:
        return F.linear(x, weight)
    out = _Linear.apply(autocast_like_linear(x), autocast_like_linear(weight), main_grad)
    return out


def linear_add(x: Tensor, packed: Tensor, addend: Tensor) -> Tensor:
    """Return addend + x @ weight^T (..., out_features), added before the only rounding.

    `packed` is the result of `pack_weight`; `addend` has the shape and the dtype of the result.
    There is no backward.
    """
    out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, addend, packed, None, "add")
    return out
