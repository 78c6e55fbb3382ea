"""Linear cross-entropy: the cross-entropy of hidden @ weight^T, one chunk of logits at a time.

Chunks of rows share one buffer. For each chunk a matmul computes the logits, the cross-entropy
kernel overwrites them with their gradient, and two matmuls compute the gradients of hidden and
weight from it. The forward therefore ends with both gradients. The backward multiplies them by the
upstream gradient and 1 / (number of rows not ignored); both stay on the device. The weight
gradient is summed over chunks in float32. A bfloat16 sum would stall at 256 times the
contribution of a chunk. `linear_cross_entropy_cpu` does the same in plain PyTorch: torch.compile
fuses what the kernel does, and unrolls the loop.

Shapes: hidden (..., D), weight (V, D), targets (...) integers; loss a float32 scalar (in the
reference, float64 for float64). Options as in cross_entropy. Rows whose target is ignore_index
have no loss and no gradient; the mean over no rows is 0. The reference computes all (N, V) logits
at once, in the accumulation dtype. Not included: gradients of the losses per token, a bias, and
vocabularies split over devices.
Saved for backward: the gradients, (N, D) in the dtype of hidden and (V, D) float32.
FLOPs: 6 N V D, all in the forward. Bytes, without the matmuls: 2 N V b in the forward, for the
softmax; 2 N D b + V D (4 + b) in the backward. Peak memory: one chunk of logits and the gradients.
Source: the chunks of Hsu et al. 2024, https://arxiv.org/abs/2410.10989.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastllama_kernels._dtype import accumulation_dtype, autocast_like_linear, check_kernel_dtypes
from fastllama_kernels._library import register
from fastllama_kernels._linear import add_matmul, linear
from fastllama_kernels._softmax import maximum_and_log_sum


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    main_grad: Tensor | None = None,
    return_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the loss of hidden @ weight^T for `targets`, a scalar, float32 or float64.

    With `return_losses` also the losses of all rows, (...), without a gradient.
    """
    logits_NV = linear(hidden.reshape(-1, hidden.shape[-1]), weight_VD, main_grad)
    logits_NV = logits_NV.to(accumulation_dtype(logits_NV))
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    targets_N = targets.flatten().long()
    valid = targets_N != ignore_index
    total = F.cross_entropy(
        logits_NV,
        targets_N,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    if z_loss:
        maximum, log_sum = maximum_and_log_sum(logits_NV)
        lse = maximum + log_sum
        total = total + z_loss * lse.square().where(valid, 0.0).sum()
    loss = total / valid.sum().clamp(min=1) if reduction == "mean" else total
    if not return_losses:
        return loss
    losses = F.cross_entropy(
        logits_NV.detach(),
        targets_N,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    if z_loss:
        losses = losses + z_loss * lse.detach().square().where(valid, 0.0)
    return loss, losses.view(targets.shape)


def chunk_length(n_tokens: int, vocab_size: int, bytes_per_logit: int) -> int:
    """Return the rows of a chunk: 8,192, or 4,096 or 2,048 if the logits would exceed 1 GiB.

    Each chunk reads and writes the float32 gradient of the weight, 8 V D bytes beside the 6 V D
    FLOPs of each row; docs/kernels.md has the arithmetic. The length depends on the shape and not
    on free memory, so the sum over chunks has the same bits in every run.
    """
    length = 8_192
    while length > 2_048 and length * vocab_size * bytes_per_logit > 2**30:
        length //= 2
    return max(1, min(n_tokens, length))


SCALED_BLOCK = 4_096
"""Elements of a program that scales a gradient: 16 per thread."""


@triton.jit
def _scaled_kernel(x_ptr, scale_ptr, out_ptr, n, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    value = tl.load(x_ptr + offsets, mask).to(tl.float32) * tl.load(scale_ptr)
    if ADDS:
        value += tl.load(out_ptr + offsets, mask)
    tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask)


def _launch_scaled(x: Tensor, scale: Tensor, out: Tensor, *, adds: bool) -> None:
    if x.numel():
        _scaled_kernel[(triton.cdiv(x.numel(), SCALED_BLOCK),)](
            x.contiguous(), scale, out, x.numel(), ADDS=adds, BLOCK=SCALED_BLOCK, num_warps=8
        )


def _scaled_fake(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@register("scaled(Tensor x, Tensor scale, ScalarType dtype) -> Tensor", _scaled_fake)
def scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return contiguous x * scale in `dtype`: computed in float32, rounded once; `scale` is ()."""
    # PyTorch would compute the offset of each element, and look up its dtype, in a slower kernel.
    out = _scaled_fake(x, scale, dtype)
    _launch_scaled(x, scale, out, adds=False)
    return out


def _add_scaled_fake(total: Tensor, x: Tensor, scale: Tensor) -> None:
    pass


@register("add_scaled_(Tensor(a!) total, Tensor x, Tensor scale) -> ()", _add_scaled_fake)
def add_scaled_(total: Tensor, x: Tensor, scale: Tensor) -> None:
    """Add x * scale to contiguous float32 `total`; `scale` is ()."""
    _launch_scaled(x, scale, total, adds=True)


def _fwd_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[:1], dtype=torch.float32)
    dhidden = hidden.new_empty(hidden.shape if need_dhidden else (0,))
    dweight = weight.new_empty(weight.shape if need_dweight else (0,), dtype=torch.float32)
    return losses, dhidden, dweight


@register(
    "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, bool need_dhidden, bool need_dweight)"
    " -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
)
def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses and the gradients of their sum; a gradient not needed is empty.

    Losses are (N,) float32, the gradient of `hidden` is (N, D) in its dtype, the gradient of
    `weight` is (V, D) float32. This is one operator, because torch.compile would unroll the loop
    over chunks.
    """
    options = (ignore_index, label_smoothing, z_loss, softcap)
    losses, dhidden, dweight = _fwd_fake(
        hidden, weight, targets, *options, need_dhidden, need_dweight
    )
    if not len(hidden):
        return losses, dhidden, dweight.zero_()
    n_tokens, vocab_size = len(hidden), len(weight)
    length = chunk_length(n_tokens, vocab_size, hidden.element_size())
    buffer = hidden.new_empty(length, vocab_size)
    for start in range(0, n_tokens, length):
        chunk = slice(start, start + length)
        logits = buffer[: len(hidden[chunk])]
        torch.mm(hidden[chunk], weight.T, out=logits)
        if not (need_dhidden or need_dweight):
            losses[chunk], *_ = torch.ops.fastllama.cross_entropy_fwd(
                logits, targets[chunk], *options
            )
            continue
        losses[chunk], *_ = torch.ops.fastllama.cross_entropy_gradient_fwd_(
            logits, targets[chunk], None, *options
        )
        if need_dhidden:
            torch.mm(logits, weight, out=dhidden[chunk])
        if need_dweight:
            add_matmul(dweight, logits.T, hidden[chunk], beta=0 if start == 0 else 1)
    return losses, dhidden, dweight


HAS_COMPILED_REGIONS = torch.__version__ >= "2.12"
"""PyTorch 2.11 knows regions for torch.compile, but runs them uncompiled."""
Function = TypeVar("Function", bound=Callable[..., Any])
CPU_CHUNK_LENGTH = 512
"""Rows of a chunk of `linear_cross_entropy_cpu`. More leave the caches, fewer slow the matmuls."""


def _cpu_fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_cross_entropy_fwd` in plain PyTorch, in any float dtype."""
    wide = accumulation_dtype(hidden)
    options = (ignore_index, label_smoothing, z_loss, softcap, need_dhidden, need_dweight)
    losses, dhidden, dweight = [], [], torch.zeros((), dtype=wide, device=hidden.device)
    for start in range(0, len(hidden), CPU_CHUNK_LENGTH):
        chunk = slice(start, start + CPU_CHUNK_LENGTH)
        maximum, total, target, dhidden_chunk, dweight_chunk = _cpu_chunk(
            hidden[chunk], weight, targets[chunk], *options
        )
        log_sum = total.log()
        loss = log_sum - (target - maximum) + z_loss * (maximum + log_sum).square()
        losses.append(loss.squeeze(-1).where(targets[chunk] != ignore_index, 0))
        dhidden.append(dhidden_chunk)
        # A 0-dim tensor alone would not widen the sum.
        dweight = dweight + dweight_chunk.to(wide)
    return torch.cat(losses), torch.cat(dhidden), dweight


def _compiled_region(function: Function) -> Function:
    """Make `function` a region of its own for torch.compile."""
    return torch.compiler.nested_compile_region(function) if HAS_COMPILED_REGIONS else function


@_compiled_region
def _cpu_chunk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the losses of a chunk of rows depend on, and the gradients of their sum.

    Without a region, Inductor computes the logits of all chunks before it uses the first. In one
    kernel it reads a row three times while the row is in the cache, unless the kernel also computes
    with the numbers that a row has only one of. So the caller computes the losses.

    Returns the maximum of the logits, the sum of exp(logits - maximum) and the logit of the target,
    all (N, 1) in the accumulation dtype, and the gradients of `hidden` and `weight` in their dtype.
    """
    logits = F.linear(hidden, weight)
    x = logits.to(accumulation_dtype(logits))
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    targets = targets.long()[:, None]
    valid = targets != ignore_index
    maximum = x.amax(-1, keepdim=True)
    exp = (x - maximum).exp()
    total = exp.sum(-1, keepdim=True)
    # Any token will do for the rows that are ignored.
    target = x.gather(-1, targets.where(valid, 0))
    if label_smoothing:
        target = torch.lerp(target, x.mean(-1, keepdim=True), label_smoothing)
    # Division by the sum takes longer.
    softmax = exp * total.reciprocal()
    if z_loss:
        softmax = softmax * (1 + 2 * z_loss * (maximum + total.log()))
    # Mixed dtypes compare more slowly, and int64 does too.
    columns = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    is_target = columns == targets.int()
    gradient = torch.where(is_target, softmax - (1 - label_smoothing), softmax)
    if label_smoothing:
        gradient = gradient - label_smoothing / x.shape[-1]
    if softcap:
        gradient = gradient * (1 - (x / softcap).square())
    dlogits = gradient.where(valid, 0).to(logits.dtype)
    dhidden = dlogits @ weight if need_dhidden else hidden.new_empty(0)
    dweight = dlogits.T @ hidden if need_dweight else weight.new_empty(0)
    return maximum, total, target, dhidden, dweight


def _plain_scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scaled` in plain PyTorch, in any float dtype."""
    # PyTorch would round a 0-dim scale to the dtype of x before multiplying.
    return torch.mul(x, scale.reshape(1), out=torch.empty_like(x, dtype=dtype))


def _plain_add_scaled(total: Tensor, x: Tensor, scale: Tensor) -> None:
    """`add_scaled_` in plain PyTorch, in any float dtype."""
    total.addcmul_(x, scale)


class _Steps(NamedTuple):
    """What `_LinearCrossEntropy` runs: kernels, or plain PyTorch."""

    fwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    scaled: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    add_scaled: Callable[[Tensor, Tensor, Tensor], None]


_KERNELS = _Steps(linear_cross_entropy_fwd, scaled, add_scaled_)
_PLAIN = _Steps(_cpu_fwd, _plain_scaled, _plain_add_scaled)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the loss and its gradients in the forward; the backward scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: _Steps,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        n_valid: Tensor,
        main_grad: Tensor | None,
        need_dhidden: bool,
        need_dweight: bool,
        return_losses: bool,
        *options: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        losses, dhidden, dweight = steps.fwd(
            hidden, weight, targets, *options, need_dhidden, need_dweight
        )
        ctx.steps = steps
        ctx.save_for_backward(dhidden, dweight, n_valid, main_grad)
        ctx.weight_dtype = weight.dtype
        if not return_losses:
            return losses.sum() / n_valid
        ctx.mark_non_differentiable(losses)
        # Otherwise the backward would get zeros for the gradient of the losses.
        ctx.set_materialize_grads(False)
        return losses.sum() / n_valid, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        dhidden, dweight, n_valid, main_grad = ctx.saved_tensors
        scale = dloss / n_valid
        _, needs_dhidden, needs_dweight = ctx.needs_input_grad[:3]
        if needs_dweight and main_grad is not None:
            ctx.steps.add_scaled(main_grad, dweight, scale)
            needs_dweight = False
        return (
            None,
            ctx.steps.scaled(dhidden, scale, dhidden.dtype) if needs_dhidden else None,
            ctx.steps.scaled(dweight, scale, ctx.weight_dtype) if needs_dweight else None,
            *(None for _ in ctx.needs_input_grad[3:]),
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    main_grad: Tensor | None = None,
    return_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the cross-entropy of hidden @ weight^T for `targets`, without all logits in memory.

    Autocast applies to `hidden` and `weight`.

    Args:
        hidden: (..., D) float32, bfloat16 or float16.
        weight_VD: (V, D), same dtype.
        targets: (...) integers of any width, each in the vocabulary or `ignore_index`.
        ignore_index: target of rows without loss.
        label_smoothing: share of the loss that is spread over the vocabulary.
        z_loss: factor of lse squared.
        softcap: bound on the magnitude of the logits; None means no bound.
        reduction: "mean", over rows not ignored, or "sum".
        main_grad: contiguous float32 (V, D); the backward adds the gradient of `weight_VD` to it
            and returns none to autograd.
        return_losses: also return the losses of all rows.

    Returns:
        The loss, a float32 scalar; with `return_losses` also the losses (...) float32, which have
        no gradient and are 0 where the target is ignored.

    Raises:
        ValueError: shapes or dtypes that do not match, options out of range, or tensors not on
            CUDA.
    """
    hidden, weight_VD = autocast_like_linear(hidden), autocast_like_linear(weight_VD)
    check_kernel_dtypes(hidden=hidden)
    if main_grad is not None and not main_grad.is_contiguous():
        raise ValueError(
            f"main_grad has strides {main_grad.stride()}, and has to be contiguous; pass a "
            "contiguous sum."
        )
    return _apply(
        _KERNELS,
        hidden,
        weight_VD,
        targets,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        reduction,
        main_grad,
        return_losses,
    )


def linear_cross_entropy_cpu(
    hidden: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    main_grad: Tensor | None = None,
    return_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linear_cross_entropy` in plain PyTorch, for a CPU under torch.compile.

    Any device and float dtype; the loss of float64 is float64.
    """
    return _apply(
        _PLAIN,
        autocast_like_linear(hidden),
        autocast_like_linear(weight_VD),
        targets,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        reduction,
        main_grad,
        return_losses,
    )


def _apply(
    steps: _Steps,
    hidden: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    main_grad: Tensor | None,
    return_losses: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    _check(hidden, weight_VD, targets, softcap, reduction)
    targets_N = targets.flatten()
    # In uint8, -100 would compare equal to 156.
    n_valid = (targets_N.long() != ignore_index).sum().clamp(min=1)
    grad = torch.is_grad_enabled()
    result: Tensor | tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(
        steps,
        hidden.reshape(-1, hidden.shape[-1]),
        weight_VD,
        targets_N,
        n_valid if reduction == "mean" else torch.ones_like(n_valid),
        main_grad,
        grad and hidden.requires_grad,
        grad and weight_VD.requires_grad,
        return_losses,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap or 0.0,
    )
    if isinstance(result, Tensor):
        return result
    loss, losses = result
    return loss, losses.view(targets.shape)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, reduction: str
) -> None:
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; both need the same dtype."
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, and needs (V, {hidden.shape[-1]})."
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, and need {tuple(hidden.shape[:-1])}."
        )
    if targets.device != hidden.device:
        raise ValueError(f"targets are on {targets.device} and hidden on {hidden.device}.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; it has to be above 0, or None for no bound.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction}; it is mean or sum.")
