"""Cross-entropy per row: loss = lse - logits[target], lse = log(sum(exp(logits))).

    d logits = exp(logits - lse) - onehot(target)

Shapes: logits (N, V), targets (N,) integers; loss (N,) or a scalar; lse (N,). Options, in the
order they apply: softcap c replaces logits by c * tanh(logits / c); label_smoothing e mixes in the
mean over the vocabulary, (1 - e) * loss + e * (lse - mean(logits)); z_loss adds z_loss * lse^2
(Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311). A row whose target is ignore_index has
loss 0 and does not count in the mean. Its gradient is 0, or NaN if a logit is NaN or +inf, or all
are -inf. The mean over no rows is 0; PyTorch returns NaN. A target outside the vocabulary gives
loss and gradient NaN and reads no memory out of bounds, so a training that skips non-finite updates
notices it. Arithmetic is in float32 (in the reference, float64 for float64). Not included: class
weights, and vocabularies split over devices.
The maximum of a row and log(sum(exp(logits - maximum))) stay apart: float32 rounds their sum, lse,
to 5e-4 where logits are near 10,000, and exp(logits - lse) would have this relative error.
Saved for backward: logits, targets, and the two numbers of a row; with `inplace` the gradient, in
the memory of the logits.
Bytes, for b bytes per logit: forward N V b. Backward 2 N V b. With `inplace`: forward 2 N V b,
backward none if the upstream gradient is 1. Rows of up to 16,384 logits stay in registers. Wider
rows are read a second time for the gradient of `inplace`. Only as many programs run as half of the
L2 cache holds rows, so the second read is from the cache. At least half of the multiprocessors
work: where the cache holds fewer rows than that, the second read is N V b more from memory.
"""

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastllama_kernels._dtype import accumulation_dtype, check_kernel_dtypes
from fastllama_kernels._library import (
    l2_bytes,
    may_write_to_inputs,
    n_multiprocessors,
    register,
)
from fastllama_kernels._softmax import maximum_and_log_sum
from fastllama_kernels._tile import row_and_columns


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
    maximum, log_sum = maximum_and_log_sum(logits)
    target_logit = logits.gather(-1, targets_N.where(valid, 0).unsqueeze(-1)).squeeze(-1)
    losses = (1 - label_smoothing) * (log_sum - (target_logit - maximum))
    if label_smoothing:
        mean = (logits - maximum.unsqueeze(-1)).mean(dim=-1)
        losses = losses + label_smoothing * (log_sum - mean)
    lse = maximum + log_sum
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
    """Return logits in float32 after the softcap, -inf past the end of the row, and its slope."""
    x = tl.load(logits_ptr + columns, columns < V, other=float("-inf")).to(tl.float32)
    slope = 1.0
    if SOFTCAP > 0:
        slope = _tanh_slope(x / SOFTCAP)
        x = tl.where(columns < V, SOFTCAP * _tanh(x / SOFTCAP), float("-inf"))
    return x, slope


@triton.jit
def _tanh_slope(x):
    """1 - tanh(x)^2, without the difference, which loses digits where tanh is near 1."""
    e = tl.exp(-2 * tl.abs(x))
    return 4 * e / ((1 + e) * (1 + e))


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


# exp(x) = exp2(x / ln 2). Triton's exp has three more instructions, for results below 2^-126.
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _store_gradient(
    gradient_ptr,
    p,
    slope,
    lse,
    dloss,
    dlse,
    target,
    columns,
    V: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
):
    """Store the gradient of dloss * loss + dlse * lse, rounded after subtracting the onehot.

    p is the softmax of the logits, slope the derivative of their softcap.
    """
    g = p * (dloss * (1 + 2 * Z_LOSS * lse) + dlse)
    g -= tl.where(columns == target, dloss * (1 - LABEL_SMOOTHING), 0.0)
    if LABEL_SMOOTHING > 0:
        g -= dloss * (LABEL_SMOOTHING / V)
    g *= slope
    tl.store(gradient_ptr + columns, g.to(gradient_ptr.dtype.element_ty), columns < V)


@triton.jit
def _cross_entropy_row(
    row,
    logits_ptr,
    targets_ptr,
    n_valid_ptr,
    loss_ptr,
    maximum_ptr,
    log_sum_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
):
    """Store the loss of a row, its maximum and log-sum, and with WRITE_GRADIENT its gradient."""
    row_ptr = logits_ptr + row * V
    target = tl.load(targets_ptr + row).to(tl.int64)
    valid = target != IGNORE_INDEX
    in_vocabulary = (target >= 0) & (target < V)
    known = tl.where(in_vocabulary, 1.0, float("nan"))
    # The maximum over threads is a barrier between this load and the stores of the gradient.
    target_logit = tl.load(row_ptr + target, in_vocabulary, other=0.0).to(tl.float32)
    if SOFTCAP > 0:
        target_logit = SOFTCAP * _tanh(target_logit / SOFTCAP)
    # Columns are compared in 32 bits. No column is -1.
    column = tl.where(in_vocabulary, target, -1).to(tl.int32)
    columns = tl.arange(0, BLOCK)
    if V <= BLOCK:
        x, slope = _load_logits(row_ptr, columns, V, SOFTCAP)
        maximum = _finite(tl.max(x))
        e = _exp(x - maximum)
        total = tl.sum(e)
        if LABEL_SMOOTHING > 0:
            sum_logits = tl.sum(tl.where(columns < V, x - maximum, 0.0))
    else:
        # A group is one load of a thread, if logits have 16 bits and 8 divides V: then threads wait
        # for others after the last block only. Otherwise the lanes of a warp share a group.
        GROUPS: tl.constexpr = BLOCK // 8
        tile = tl.arange(0, GROUPS)[:, None] * 8 + tl.arange(0, 8)[None, :]
        highest_of = tl.full((GROUPS,), float("-inf"), tl.float32)
        total_of = tl.zeros((GROUPS,), tl.float32)
        if LABEL_SMOOTHING > 0:
            # Near the target's logit, sums keep their digits wherever the logits are.
            origin = _finite(target_logit)
            sum_of = tl.zeros((GROUPS,), tl.float32)
        for start in range(0, V, BLOCK):
            x, _ = _load_logits(row_ptr, start + tile, V, SOFTCAP)
            new_highest = tl.maximum(highest_of, tl.max(x, 1))
            shift = _finite(new_highest)
            total_of *= _exp(highest_of - shift)
            total_of += tl.sum(_exp(x - shift[:, None]), 1)
            highest_of = new_highest
            if LABEL_SMOOTHING > 0:
                sum_of += tl.sum(tl.where(start + tile < V, x - origin, 0.0), 1)
        maximum = _finite(tl.max(highest_of))
        total = tl.sum(total_of * _exp(highest_of - maximum))
        if LABEL_SMOOTHING > 0:
            sum_logits = tl.sum(sum_of) + V * (origin - maximum)
    log_sum = tl.log(total)
    lse = maximum + log_sum
    loss = (1 - LABEL_SMOOTHING) * (log_sum - (target_logit - maximum)) + Z_LOSS * lse * lse
    if LABEL_SMOOTHING > 0:
        loss += LABEL_SMOOTHING * (log_sum - sum_logits / V)
    tl.store(loss_ptr + row, tl.where(valid, loss * known, 0.0))
    tl.store(maximum_ptr + row, maximum)
    tl.store(log_sum_ptr + row, log_sum)
    if WRITE_GRADIENT:
        dloss = tl.where(valid, known, 0.0)
        if n_valid_ptr is not None:
            dloss = dloss / tl.load(n_valid_ptr).to(tl.float32)
        if V <= BLOCK:
            _store_gradient(
                row_ptr,
                e * (1 / total),
                slope,
                lse,
                dloss,
                0.0,
                column,
                columns,
                V,
                LABEL_SMOOTHING,
                Z_LOSS,
            )
        else:
            # From the end of the row, which the caches still have.
            for block in range(tl.cdiv(V, BLOCK)):
                later = (tl.cdiv(V, BLOCK) - 1 - block) * BLOCK + columns
                x, slope = _load_logits(row_ptr, later, V, SOFTCAP)
                _store_gradient(
                    row_ptr,
                    _exp(x - maximum) * (1 / total),
                    slope,
                    lse,
                    dloss,
                    0.0,
                    column,
                    later,
                    V,
                    LABEL_SMOOTHING,
                    Z_LOSS,
                )


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,
    targets_ptr,
    n_valid_ptr,
    loss_ptr,
    maximum_ptr,
    log_sum_ptr,
    n_rows,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
):
    # int64, so that row * V does not overflow.
    program = tl.program_id(0).to(tl.int64)
    if V > BLOCK and WRITE_GRADIENT:
        for row in range(program, n_rows, tl.num_programs(0)):
            _cross_entropy_row(
                row,
                logits_ptr,
                targets_ptr,
                n_valid_ptr,
                loss_ptr,
                maximum_ptr,
                log_sum_ptr,
                V,
                BLOCK,
                IGNORE_INDEX,
                LABEL_SMOOTHING,
                Z_LOSS,
                SOFTCAP,
                WRITE_GRADIENT,
            )
    else:
        _cross_entropy_row(
            program,
            logits_ptr,
            targets_ptr,
            n_valid_ptr,
            loss_ptr,
            maximum_ptr,
            log_sum_ptr,
            V,
            BLOCK,
            IGNORE_INDEX,
            LABEL_SMOOTHING,
            Z_LOSS,
            SOFTCAP,
            WRITE_GRADIENT,
        )


@triton.jit
def _cross_entropy_bwd_kernel(
    dloss_ptr,
    dlse_ptr,
    logits_ptr,
    targets_ptr,
    maximum_ptr,
    log_sum_ptr,
    dlogits_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    row, columns = row_and_columns(V, BLOCK)
    target = tl.load(targets_ptr + row).to(tl.int64)
    in_vocabulary = (target >= 0) & (target < V)
    known = tl.where(in_vocabulary, 1.0, float("nan"))
    dloss = tl.where(target != IGNORE_INDEX, tl.load(dloss_ptr + row) * known, 0.0)
    dlse = tl.load(dlse_ptr + row)
    maximum = tl.load(maximum_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    x, slope = _load_logits(logits_ptr + row * V, columns, V, SOFTCAP)
    _store_gradient(
        dlogits_ptr + row * V,
        _exp(x - maximum) * _exp(-log_sum),
        slope,
        maximum + log_sum,
        dloss,
        dlse,
        tl.where(in_vocabulary, target, -1).to(tl.int32),
        columns,
        V,
        LABEL_SMOOTHING,
        Z_LOSS,
    )


@triton.jit
def _scale_kernel(
    x_ptr, scale_ptr, SCALE_STRIDE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):
    row, columns = row_and_columns(V, BLOCK)
    scale = tl.load(scale_ptr + row * SCALE_STRIDE).to(tl.float32)
    if scale != 1.0:
        x_ptr += row * V
        x = tl.load(x_ptr + columns, columns < V, other=0.0).to(tl.float32)
        tl.store(x_ptr + columns, (x * scale).to(x_ptr.dtype.element_ty), columns < V)


def forward_config(vocab_size: int, write_gradient: bool, has_softcap: bool) -> dict[str, int]:
    """Return block and warps of the forward.

    Rows of up to 16,384 logits are one block, 32 logits per thread. A wider row is read in a loop
    over blocks, 16 logits per thread. A program that reads it again has 32 warps, so that few rows
    are in the cache at a time. The softcap's tanh and slope take registers: 8 logits per thread.
    """
    if vocab_size <= 16_384:
        block = triton.next_power_of_2(vocab_size)
        return {"BLOCK": block, "num_warps": max(block // (256 if has_softcap else 1_024), 1)}
    warps = 32 if write_gradient else 8
    return {"BLOCK": warps * (256 if has_softcap else 512), "num_warps": warps}


def cached_programs(n_multiprocessors: int, l2_bytes: int, row_bytes: int) -> int:
    """Return how many programs that read a row twice run at a time, at most one a multiprocessor.

    Half of the L2 cache holds the rows of all. At least half of the multiprocessors work, so that
    enough loads are in flight.
    """
    return min(n_multiprocessors, max(l2_bytes // 2 // row_bytes, n_multiprocessors // 2, 1))


def _forward_programs(logits: Tensor, write_gradient: bool) -> int:
    """Return how many programs share the rows (N, V)."""
    n_rows, vocab_size = logits.shape
    if not write_gradient or vocab_size <= 16_384:
        return n_rows
    device, row_bytes = logits.device, vocab_size * logits.element_size()
    return min(n_rows, cached_programs(n_multiprocessors(device), l2_bytes(device), row_bytes))


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
) -> tuple[Tensor, Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[:1], dtype=torch.float32)
    return losses, torch.empty_like(losses), torch.empty_like(losses)


@register(
    f"cross_entropy_fwd(Tensor logits, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
)
def cross_entropy_fwd(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, maximum and log(sum(exp(logits - maximum))), each (N,) float32.

    `softcap` 0 means no cap.
    """
    options = (ignore_index, label_smoothing, z_loss, softcap)
    losses, maximum, log_sum = _fwd_fake(logits, targets, *options)
    logits = logits.contiguous()
    _launch_fwd(logits, targets, None, losses, maximum, log_sum, *options, write_gradient=False)
    return losses, maximum, log_sum


def _gradient_fwd_fake(
    logits: Tensor,
    targets: Tensor,
    n_valid: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fwd_fake(logits, targets, ignore_index, label_smoothing, z_loss, softcap)


@register(
    "cross_entropy_gradient_fwd_(Tensor(a!) logits, Tensor targets, Tensor? n_valid, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `cross_entropy_fwd` does; replace contiguous `logits` by their gradient.

    It is the gradient of sum(losses) / n_valid.
    """
    options = (ignore_index, label_smoothing, z_loss, softcap)
    losses, maximum, log_sum = _fwd_fake(logits, targets, *options)
    _launch_fwd(logits, targets, n_valid, losses, maximum, log_sum, *options, write_gradient=True)
    return losses, maximum, log_sum


def _launch_fwd(
    logits: Tensor,
    targets: Tensor,
    n_valid: Tensor | None,
    losses: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    *,
    write_gradient: bool,
) -> None:
    if logits.numel():
        _cross_entropy_fwd_kernel[(_forward_programs(logits, write_gradient),)](
            logits,
            targets.contiguous(),
            n_valid,
            losses,
            maximum,
            log_sum,
            len(logits),
            V=logits.shape[1],
            IGNORE_INDEX=ignore_index,
            LABEL_SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            SOFTCAP=softcap,
            WRITE_GRADIENT=write_gradient,
            **forward_config(logits.shape[1], write_gradient, softcap > 0),
        )


def _bwd_fake(
    dlosses: Tensor,
    dlse: Tensor,
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@register(
    "cross_entropy_bwd(Tensor dlosses, Tensor dlse, Tensor logits, Tensor targets, Tensor maximum, "
    f"Tensor log_sum, {_OPTIONS}) -> Tensor",
    _bwd_fake,
)
def cross_entropy_bwd(
    dlosses: Tensor,
    dlse: Tensor,
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
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
        _cross_entropy_bwd_kernel[(n_rows * triton.cdiv(vocab_size, config["BLOCK"]),)](
            dlosses.contiguous(),
            dlse.contiguous(),
            logits.contiguous(),
            targets.contiguous(),
            maximum.contiguous(),
            log_sum.contiguous(),
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
        _scale_kernel[(n_rows * triton.cdiv(vocab_size, config["BLOCK"]),)](
            x, scale.contiguous(), SCALE_STRIDE=scale.ndim, V=vocab_size, **config
        )


class _CrossEntropy(torch.autograd.Function):
    """Computes the losses and lse in the forward and the gradient in the backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, *options: float
    ) -> tuple[Tensor, Tensor]:
        losses, maximum, log_sum = cross_entropy_fwd(logits, targets, *options)
        ctx.save_for_backward(logits, targets, maximum, log_sum)
        ctx.options = options
        return losses, maximum + log_sum

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
        losses, maximum, log_sum = cross_entropy_gradient_fwd_(
            logits_NV, targets_N, n_valid if reduction == "mean" else None, *options
        )
        loss = _reduce(losses, n_valid, reduction)
        lse = maximum + log_sum
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
