"""Cross-entropy per row: loss = lse - logits[target], lse = log(sum(exp(logits))).

    d logits = exp(logits - lse) - onehot(target)

Shapes: logits (N, V), targets (N,) integers; loss (N,) or a scalar; lse (N,). Options, in the
order they apply: softcap c replaces logits by c * tanh(logits / c); label_smoothing e mixes in the
mean over the vocabulary, (1 - e) * loss + e * (lse - mean(logits)); z_loss adds z_loss * lse^2
(Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311). A row whose target is ignore_index has
loss 0 and gradient 0 and does not count in the mean. The mean over no rows is 0; PyTorch returns
NaN. A target outside the vocabulary gives loss and gradient NaN and reads no memory out of bounds,
so a training that skips non-finite updates notices it. Arithmetic is in float32 (in the reference,
float64 for float64). Not included: class weights, and vocabularies split over devices.
Saved for backward: logits, targets, lse; with `inplace` the gradient, in the memory of the logits.
Bytes, for b bytes per logit: forward N V b. Rows of up to 16,384 logits stay in registers. Wider
rows are read a second time for the gradient of `inplace`, mostly from the L2 cache. Backward
2 N V b. With `inplace`: forward 2 N V b, backward none if the upstream gradient is 1.
"""

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastllama_kernels._dtype import accumulation_dtype, check_kernel_dtypes
from fastllama_kernels._library import may_write_to_inputs, register


def cross_entropy_reference(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the loss of `logits` (N, V) for `targets` (N,), and lse (N,); float32 or float64.

    `inplace` permits overwriting the logits; the reference does not use it.
    """
    logits = logits_NV.to(accumulation_dtype(logits_NV))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    targets_N = targets_N.long()
    valid = targets_N != ignore_index
    lse = torch.logsumexp(logits, dim=-1)
    target_logit = logits.gather(-1, targets_N.where(valid, 0).unsqueeze(-1)).squeeze(-1)
    losses = (1 - label_smoothing) * (lse - target_logit)
    if label_smoothing:
        losses = losses + label_smoothing * (lse - logits.mean(dim=-1))
    losses = (losses + z_loss * lse.square()).where(valid, 0.0)
    return _reduce(losses, _n_valid(targets_N, ignore_index), reduction), lse


def _n_valid(targets: Tensor, ignore_index: int) -> Tensor:
    """Return the number of rows that are not ignored, at least 1, without a host sync."""
    # In uint8, -100 would compare equal to 156.
    return (targets.long() != ignore_index).sum().clamp(min=1)


def _reduce(losses: Tensor, n_valid: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() / n_valid if reduction == "mean" else losses.sum()


@triton.jit
def _load_logits(logits_ptr, columns, V: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return logits in float32 after the softcap; -inf past the end of the row."""
    x = tl.load(logits_ptr + columns, columns < V, other=float("-inf")).to(tl.float32)
    if SOFTCAP > 0:
        x = tl.where(columns < V, SOFTCAP * _tanh(x / SOFTCAP), float("-inf"))
    return x


@triton.jit
def _tanh(x):
    """Written out, because Triton's interpreter has no libdevice."""
    e = tl.exp(-2 * tl.abs(x))
    large = tl.where(x < 0, -1.0, 1.0) * (1 - 2 * e / (1 + e))
    # Below 1/4 the difference above loses digits; the series up to x^9 keeps them.
    x2 = tl.where(tl.abs(x) < 0.25, x * x, 0.0)
    series = 1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * series, large)


@triton.jit
def _finite(highest):
    """Return the shift for exp: `highest`, or 0 if it is -inf, because -inf - -inf is NaN."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def _store_gradient(
    gradient_ptr,
    x,
    lse,
    dloss,
    dlse,
    target,
    columns,
    V: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Store the gradient of dloss * loss + dlse * lse, rounded after subtracting the onehot."""
    g = tl.exp(x - lse) * (dloss * (1 + 2 * Z_LOSS * lse) + dlse)
    g -= tl.where(columns == target, dloss * (1 - LABEL_SMOOTHING), 0.0)
    if LABEL_SMOOTHING > 0:
        g -= dloss * (LABEL_SMOOTHING / V)
    if SOFTCAP > 0:
        capped = tl.where(columns < V, x / SOFTCAP, 0.0)
        g *= 1 - capped * capped
    tl.store(gradient_ptr + columns, g.to(gradient_ptr.dtype.element_ty), columns < V)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,
    targets_ptr,
    n_valid_ptr,
    loss_ptr,
    lse_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(targets_ptr + row).to(tl.int64)
    valid = target != IGNORE_INDEX
    columns = tl.arange(0, BLOCK)
    x = _load_logits(logits_ptr, columns, V, SOFTCAP)
    highest = tl.max(x)
    total = tl.sum(tl.exp(x - _finite(highest)))
    # From registers: a load could return the gradient, which overwrites the logits below.
    target_logit = tl.sum(tl.where(columns == target, x, 0.0))
    sum_logits = tl.sum(tl.where(columns < V, x, 0.0)) if LABEL_SMOOTHING > 0 else 0.0
    for start in range(BLOCK, V, BLOCK):
        later = start + columns
        x = _load_logits(logits_ptr, later, V, SOFTCAP)
        new_highest = tl.maximum(highest, tl.max(x))
        shift = _finite(new_highest)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift))
        highest = new_highest
        target_logit += tl.sum(tl.where(later == target, x, 0.0))
        if LABEL_SMOOTHING > 0:
            sum_logits += tl.sum(tl.where(later < V, x, 0.0))
    lse = highest + tl.log(total)
    loss = (1 - LABEL_SMOOTHING) * (lse - target_logit) + Z_LOSS * lse * lse
    if LABEL_SMOOTHING > 0:
        loss += LABEL_SMOOTHING * (lse - sum_logits / V)
    in_vocabulary = (target >= 0) & (target < V)
    known = tl.where(in_vocabulary, 1.0, float("nan"))
    tl.store(loss_ptr + row, tl.where(valid, loss * known, 0.0))
    tl.store(lse_ptr + row, lse)
    if WRITE_GRADIENT:
        dloss = tl.where(valid, known, 0.0)
        if n_valid_ptr is not None:
            dloss = dloss / tl.load(n_valid_ptr).to(tl.float32)
        if V <= BLOCK:
            _store_gradient(
                logits_ptr, x, lse, dloss, 0.0, target, columns, V, LABEL_SMOOTHING, Z_LOSS, SOFTCAP
            )
        else:
            for start in range(0, V, BLOCK):
                later = start + columns
                x = _load_logits(logits_ptr, later, V, SOFTCAP)
                _store_gradient(
                    logits_ptr,
                    x,
                    lse,
                    dloss,
                    0.0,
                    target,
                    later,
                    V,
                    LABEL_SMOOTHING,
                    Z_LOSS,
                    SOFTCAP,
                )


@triton.jit
def _cross_entropy_bwd_kernel(
    dloss_ptr,
    dlse_ptr,
    logits_ptr,
    targets_ptr,
    lse_ptr,
    dlogits_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row).to(tl.int64)
    known = tl.where((target >= 0) & (target < V), 1.0, float("nan"))
    dloss = tl.where(target != IGNORE_INDEX, tl.load(dloss_ptr + row) * known, 0.0)
    dlse = tl.load(dlse_ptr + row)
    lse = tl.load(lse_ptr + row)
    x = _load_logits(logits_ptr + row * V, columns, V, SOFTCAP)
    _store_gradient(
        dlogits_ptr + row * V,
        x,
        lse,
        dloss,
        dlse,
        target,
        columns,
        V,
        LABEL_SMOOTHING,
        Z_LOSS,
        SOFTCAP,
    )


@triton.jit
def _scale_kernel(
    x_ptr, scale_ptr, SCALE_STRIDE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + row * SCALE_STRIDE).to(tl.float32)
    if scale != 1.0:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x_ptr += row * V
        x = tl.load(x_ptr + columns, columns < V, other=0.0).to(tl.float32)
        tl.store(x_ptr + columns, (x * scale).to(x_ptr.dtype.element_ty), columns < V)


def forward_config(vocab_size: int) -> dict[str, int]:
    """Return block and warps of the forward: 16 logits per thread; 32 would spill.

    Rows wider than 16,384 are read in a loop over small blocks. More programs then fit on a
    multiprocessor. A program of 32 warps has 64 registers per thread and spills in Triton 3.9.
    """
    block = triton.next_power_of_2(vocab_size) if vocab_size <= 16_384 else 4_096
    return {"BLOCK": block, "num_warps": max(block // 512, 1)}


def elementwise_config(vocab_size: int) -> dict[str, int]:
    """Return block and warps of the elementwise kernels: 16 logits per thread."""
    block = min(triton.next_power_of_2(vocab_size), 4_096)
    return {"BLOCK": block, "num_warps": max(block // 512, 1)}


_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap"


def _fwd_fake(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[:1], dtype=torch.float32)
    return losses, torch.empty_like(losses)


@register(
    f"cross_entropy_fwd(Tensor logits, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor)", _fwd_fake
)
def cross_entropy_fwd(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Return the losses and lse, both (N,) float32; `softcap` 0 means no cap."""
    options = (ignore_index, label_smoothing, z_loss, softcap)
    losses, lse = _fwd_fake(logits, targets, *options)
    _launch_fwd(logits.contiguous(), targets, None, losses, lse, *options, write_gradient=False)
    return losses, lse


def _gradient_fwd_fake(
    logits: Tensor,
    targets: Tensor,
    n_valid: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    return _fwd_fake(logits, targets, ignore_index, label_smoothing, z_loss, softcap)


@register(
    "cross_entropy_gradient_fwd_(Tensor(a!) logits, Tensor targets, Tensor? n_valid, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    _gradient_fwd_fake,
)
def cross_entropy_gradient_fwd_(
    logits: Tensor,
    targets: Tensor,
    n_valid: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Return the losses and lse; replace contiguous `logits` by d sum(losses) / n_valid."""
    options = (ignore_index, label_smoothing, z_loss, softcap)
    losses, lse = _fwd_fake(logits, targets, *options)
    _launch_fwd(logits, targets, n_valid, losses, lse, *options, write_gradient=True)
    return losses, lse


def _launch_fwd(
    logits: Tensor,
    targets: Tensor,
    n_valid: Tensor | None,
    losses: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    *,
    write_gradient: bool,
) -> None:
    if logits.numel():
        _cross_entropy_fwd_kernel[(len(logits),)](
            logits,
            targets.contiguous(),
            n_valid,
            losses,
            lse,
            V=logits.shape[1],
            IGNORE_INDEX=ignore_index,
            LABEL_SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            SOFTCAP=softcap,
            WRITE_GRADIENT=write_gradient,
            **forward_config(logits.shape[1]),
        )


def _bwd_fake(
    dlosses: Tensor,
    dlse: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@register(
    "cross_entropy_bwd(Tensor dlosses, Tensor dlse, Tensor logits, Tensor targets, Tensor lse, "
    f"{_OPTIONS}) -> Tensor",
    _bwd_fake,
)
def cross_entropy_bwd(
    dlosses: Tensor,
    dlse: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """Return the gradient of `logits` (N, V), in their dtype; `dlosses` and `dlse` are (N,)."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    n_rows, vocab_size = logits.shape
    config = elementwise_config(vocab_size)
    if logits.numel():
        _cross_entropy_bwd_kernel[(n_rows, triton.cdiv(vocab_size, config["BLOCK"]))](
            dlosses.contiguous(),
            dlse.contiguous(),
            logits.contiguous(),
            targets.contiguous(),
            lse.contiguous(),
            dlogits,
            V=vocab_size,
            IGNORE_INDEX=ignore_index,
            LABEL_SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            SOFTCAP=softcap,
            **config,
        )
    return dlogits


def _scale_fake(x: Tensor, scale: Tensor) -> None:
    pass


@register("scale_(Tensor(a!) x, Tensor scale) -> ()", _scale_fake)
def scale_(x: Tensor, scale: Tensor) -> None:
    """Multiply contiguous `x` (N, V) by `scale`, () or (N,); rows whose scale is 1 are not read."""
    n_rows, vocab_size = x.shape
    config = elementwise_config(vocab_size)
    if x.numel():
        _scale_kernel[(n_rows, triton.cdiv(vocab_size, config["BLOCK"]))](
            x, scale.contiguous(), SCALE_STRIDE=scale.ndim, V=vocab_size, **config
        )


class _CrossEntropy(torch.autograd.Function):
    """Computes the losses and lse in the forward and the gradient in the backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, *options: float
    ) -> tuple[Tensor, Tensor]:
        losses, lse = cross_entropy_fwd(logits, targets, *options)
        ctx.save_for_backward(logits, targets, lse)
        ctx.options = options
        return losses, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        dlogits = cross_entropy_bwd(dlosses, dlse, *ctx.saved_tensors, *ctx.options)
        return dlogits, None, *(None for _ in ctx.options)


class _InplaceCrossEntropy(torch.autograd.Function):
    """Attaches a computed loss to the logits, whose memory holds the gradient already."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        # `scale_` changes the saved tensor, so autograd raises in a second backward.
        (gradient,) = ctx.saved_tensors
        scale_(gradient, dloss)
        return gradient, None


def cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the loss of `logits` for `targets`, and the log-sum-exp of each row.

    Args:
        logits_NV: (N, V) float32, bfloat16 or float16.
        targets_N: (N,) integers of any width, each in the vocabulary or `ignore_index`.
        ignore_index: target of rows without loss.
        label_smoothing: share of the loss that is spread over the vocabulary.
        z_loss: factor of lse squared.
        softcap: bound on the magnitude of the logits; None means no bound.
        reduction: "none" returns the loss of every row; "mean" is over rows not ignored.
        inplace: write the gradient into the logits during the forward. The logits must be
            contiguous, and their values are lost. No gradient flows through lse, and a second
            backward raises. Use float32 or bfloat16 logits: float16 gradients are rounded before
            a loss scale can scale them up. In eager mode under a dispatch mode, such as selective
            activation checkpointing, the logits are not written to.

    Returns:
        The loss, a scalar or (N,) for "none", and lse (N,); both float32.

    Raises:
        ValueError: shapes or dtypes that do not match, options out of range, or tensors not on
            CUDA.
    """
    _check(logits_NV, targets_N, softcap, reduction, inplace)
    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0)
    n_valid = _n_valid(targets_N, ignore_index)
    if not (inplace and may_write_to_inputs()):
        losses, lse = _CrossEntropy.apply(logits_NV, targets_N, *options)
        return _reduce(losses, n_valid, reduction), lse
    # Outside the autograd Function: torch.compile may lose a mutation inside one.
    with torch.no_grad():
        losses, lse = cross_entropy_gradient_fwd_(
            logits_NV, targets_N, n_valid if reduction == "mean" else None, *options
        )
        loss = _reduce(losses, n_valid, reduction)
    return _InplaceCrossEntropy.apply(logits_NV, loss), lse


def _check(
    logits: Tensor, targets: Tensor, softcap: float | None, reduction: str, inplace: bool
) -> None:
    check_kernel_dtypes(logits=logits)
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and targets {tuple(targets.shape)}; they "
            "need (N, V) and (N,)."
        )
    if targets.device != logits.device:
        raise ValueError(f"targets are on {targets.device} and logits on {logits.device}.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; it has to be above 0, or None for no bound.")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is {reduction}; it is none, mean or sum.")
    if inplace and not logits.is_contiguous():
        raise ValueError("inplace needs contiguous logits; pass logits.contiguous().")
