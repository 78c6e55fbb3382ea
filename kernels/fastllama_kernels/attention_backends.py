"""The attentions of a GPU, with the signature and the meaning of `attention_reference`.

| name         | one sequence a row                       | packed documents              |
|--------------|------------------------------------------|-------------------------------|
| flash-attn-3 | PyTorch SDPA over FlashAttention 3       | varlen_attn over the same     |
| flash-attn-4 | PyTorch SDPA over FlashAttention 4, CuTe | varlen_attn over the same     |
| flash-attn-2 | flash_attn_func                          | flash_attn_varlen_func        |
| cudnn        | PyTorch SDPA, cuDNN                      | as flash                      |
| flash        | PyTorch SDPA, its own FlashAttention 2   | varlen_attn over the same     |
| reference    | attention_reference                      | attention_reference, a mask   |

SDPA is pinned to one kernel, so a shape it cannot take is an error and not a slower kernel. What
training does, T == S > 1, runs on the kernels; decoding, T != S or a single token, runs on the
reference: a choice by shape alone. cuDNN never sees a mask, which it turns into NaN for some
lengths (https://github.com/pytorch/pytorch/issues/196678), nor decoding, where it would build a
plan for every number of keys.
Source: Dao 2023, https://arxiv.org/abs/2307.08691; Shah et al. 2024,
https://arxiv.org/abs/2407.08608.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn import functional as F
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.varlen import varlen_attn

from fastllama_kernels.attention import attention_reference, flatten_cu_seqlens

Attention = Callable[..., Tensor]
Dense = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
Packed = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]

_FROM_AMPERE = range(8, 100)
_NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# PyTorch 2.11 takes grouped heads unasked and has no such argument.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


@dataclass(frozen=True)
class AttentionShape:
    """What the attention of a training step is called with: causal, as many keys as queries."""

    batch_size: int
    seq_len: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Backend:
    """One way to compute attention."""

    name: str
    """As the user types it."""
    unsupported_reason: Callable[[AttentionShape], str | None]
    """One clause, with "it" for the backend, why it cannot serve the shape here, or None."""
    load: Callable[[], Attention]
    """Imports what it needs, tells PyTorch which FlashAttention it runs, returns the operator.

    That setting holds for the whole process, so of the backends that run on PyTorch's flash
    kernels only the one loaded last is what its name says.
    """


def sdpa_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`attention_reference`, of which cuDNN may serve training without a mask and nothing else."""
    if cu_seqlens is None and q_BTHK.shape[1] == k_BSGK.shape[1] > 1:
        return attention_reference(q_BTHK, k_BSGK, v_BSGK, causal=causal)
    return attention_without_cudnn(q_BTHK, k_BSGK, v_BSGK, causal=causal, cu_seqlens=cu_seqlens)


def attention_without_cudnn(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`attention_reference` on kernels that take masks, and any length without a plan for it."""
    with sdpa_kernel(_NOT_CUDNN):
        return attention_reference(q_BTHK, k_BSGK, v_BSGK, causal=causal, cu_seqlens=cu_seqlens)


def fused_attention(dense: Dense, packed: Packed) -> Attention:
    """The operator over a library's two entry points.

    Args:
        dense: (q (B, T, H, K), k, v (B, T, G, K), causal) to (B, T, H, K).
        packed: (q (N, H, K), k, v (N, G, K), boundaries int32, longest, causal) to (N, H, K).
    """

    def attention(
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGK: Tensor,
        *,
        causal: bool = True,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        batch_size, n_queries = q_BTHK.shape[:2]
        if n_queries != k_BSGK.shape[1] or n_queries == 1:
            return attention_without_cudnn(
                q_BTHK, k_BSGK, v_BSGK, causal=causal, cu_seqlens=cu_seqlens
            )
        if cu_seqlens is None:
            out_BTHK = dense(q_BTHK, k_BSGK, v_BSGK, causal)
        else:
            q_NHK, k_NGK, v_NGK = (x.flatten(0, 1) for x in (q_BTHK, k_BSGK, v_BSGK))
            boundaries = flatten_cu_seqlens(cu_seqlens, n_queries)
            out_NHK = packed(q_NHK, k_NGK, v_NGK, boundaries, n_queries, causal)
            out_BTHK = out_NHK.unflatten(0, (batch_size, n_queries))
        dense_gradient: Tensor = _DenseGradient.apply(out_BTHK)
        return dense_gradient

    return attention


class _DenseGradient(torch.autograd.Function):
    """The identity; its gradient has memory of its own.

    Kernels walk the gradient by its strides, and those of an expanded one are 0, which not all of
    them take. The gradient a projection hands back is dense already and passes as it is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def pinned_sdpa(kernel: SDPBackend) -> Attention:
    """SDPA on one of its kernels, packed documents on PyTorch's flash kernel."""

    def dense(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(kernel):
            out_BHTK = F.scaled_dot_product_attention(
                q_BTHK.transpose(1, 2),
                k_BTGK.transpose(1, 2),
                v_BTGK.transpose(1, 2),
                is_causal=causal,
                enable_gqa=q_BTHK.shape[2] != k_BTGK.shape[2],
            )
        return out_BHTK.transpose(1, 2)

    def packed(
        q_NHK: Tensor,
        k_NGK: Tensor,
        v_NGK: Tensor,
        boundaries: Tensor,
        longest: int,
        causal: bool,
    ) -> Tensor:
        window = (-1, 0 if causal else -1)
        # Newer PyTorch prefers cuDNN here, where documents of length 0 are untried.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out_NHK = varlen_attn(
                q_NHK,
                k_NGK,
                v_NGK,
                boundaries,
                boundaries,
                longest,
                longest,
                window_size=window,
                **_GROUPED,
            )
        return cast(Tensor, out_NHK)

    return fused_attention(dense, packed)


def set_flash_implementation(name: str | None) -> None:
    """Have PyTorch's flash kernels be those of "FA3" or "FA4", or for None its own."""
    if name is None:
        if current_flash_attention_impl() is not None:
            restore_flash_attention_impl()
        return
    with warnings.catch_warnings():
        # To override PyTorch's kernels is the purpose.
        warnings.filterwarnings("ignore", "(?s).*overriding a previously registered kernel")
        activate_flash_attention_impl(name)


def _load_sdpa(kernel: SDPBackend, flash: str | None = None) -> Attention:
    set_flash_implementation(flash)
    return pinned_sdpa(kernel)


def _load_flash_attn_2() -> Attention:
    set_flash_implementation(None)
    library = import_module("flash_attn")
    flash_attn, flash_attn_varlen = library.flash_attn_func, library.flash_attn_varlen_func

    def dense(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, causal: bool) -> Tensor:
        out_BTHK: Tensor = flash_attn(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out_BTHK

    def packed(
        q_NHK: Tensor,
        k_NGK: Tensor,
        v_NGK: Tensor,
        boundaries: Tensor,
        longest: int,
        causal: bool,
    ) -> Tensor:
        out_NHK: Tensor = flash_attn_varlen(
            q_NHK,
            k_NGK,
            v_NGK,
            boundaries,
            boundaries,
            longest,
            longest,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out_NHK

    return fused_attention(dense, packed)


def _load_reference() -> Attention:
    set_flash_implementation(None)
    return sdpa_attention


def _gpu_unsupported_reason(shape: AttentionShape, majors: range, max_head_dim: int) -> str | None:
    if shape.device.type != "cuda":
        return f"it needs a CUDA device, not {shape.device.type}"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {str(shape.dtype).removeprefix('torch.')}"
    major, minor = torch.cuda.get_device_capability(shape.device)
    if major not in majors:
        return f"it has no kernels for compute capability {major}.{minor}"
    if shape.head_dim % 8 or shape.head_dim > max_head_dim:
        return f"it takes heads of width 8, 16, ... {max_head_dim}, not {shape.head_dim}"
    return None


def _package_unsupported_reason(
    shape: AttentionShape,
    *,
    majors: range,
    max_head_dim: int,
    module: str,
    attribute: str,
    remedy: str,
) -> str | None:
    unsupported_reason = _gpu_unsupported_reason(shape, majors, max_head_dim)
    if unsupported_reason is not None:
        return unsupported_reason
    missing = f"the package {module} is not installed ({remedy})"
    try:
        imported = import_module(module)
    except ModuleNotFoundError as error:
        # It may also be one that the package needs.
        return missing if module.startswith(str(error.name)) else _broken(module, error)
    except Exception as error:  # A library built for another PyTorch raises anything.
        return _broken(module, error)
    # Without FlashAttention 2, flash_attn is the empty parent of flash_attn.cute.
    return None if hasattr(imported, attribute) else missing


def _broken(module: str, error: Exception) -> str:
    return f"the package {module} cannot be imported ({first_line(error)})"


def first_line(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _sdpa_unsupported_reason(
    shape: AttentionShape,
    *,
    max_head_dim: int,
    can_use: Callable[[SDPAParams, bool], bool],
) -> str | None:
    return _gpu_unsupported_reason(shape, _FROM_AMPERE, max_head_dim) or _refusal(shape, can_use)


def _refusal(shape: AttentionShape, can_use: Callable[[SDPAParams, bool], bool]) -> str | None:
    """What PyTorch says of its build, cuDNN's version and the deterministic mode.

    It looks at shapes, strides and types; one row serves as all.
    """
    row_K = torch.empty(shape.head_dim, dtype=shape.dtype, device=shape.device, requires_grad=True)
    q_BHTK, k_BGTK = (
        row_K.expand(shape.batch_size, n_heads, shape.seq_len, -1)
        for n_heads in (shape.n_heads, shape.n_kv_heads)
    )
    grouped = shape.n_heads != shape.n_kv_heads
    params = SDPAParams(q_BHTK, k_BGTK, k_BGTK, None, 0.0, True, grouped)
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        if can_use(params, True):
            return None
    said = "; ".join(str(reason.message).partition(" (Triggered")[0] for reason in reasons)
    return f"PyTorch refuses it ({said or 'without a reason'})"


BACKENDS = (
    Backend(
        "flash-attn-3",
        partial(
            _package_unsupported_reason,
            majors=range(9, 10),
            max_head_dim=256,
            module="flash_attn_interface",
            attribute="flash_attn_func",
            remedy="build the hopper folder of github.com/Dao-AILab/flash-attention",
        ),
        partial(_load_sdpa, SDPBackend.FLASH_ATTENTION, flash="FA3"),
    ),
    Backend(
        "flash-attn-4",
        partial(
            _package_unsupported_reason,
            majors=range(9, 11),
            max_head_dim=256,
            module="flash_attn.cute.interface",
            attribute="_flash_attn_fwd",
            remedy="pip install flash-attn-4",
        ),
        partial(_load_sdpa, SDPBackend.FLASH_ATTENTION, flash="FA4"),
    ),
    Backend(
        "flash-attn-2",
        partial(
            _package_unsupported_reason,
            majors=_FROM_AMPERE,
            max_head_dim=256,
            module="flash_attn",
            attribute="flash_attn_func",
            remedy="pip install --no-build-isolation 'fastllama[flash]'",
        ),
        _load_flash_attn_2,
    ),
    Backend(
        "cudnn",
        partial(_sdpa_unsupported_reason, max_head_dim=128, can_use=can_use_cudnn_attention),
        partial(_load_sdpa, SDPBackend.CUDNN_ATTENTION),
    ),
    Backend(
        "flash",
        partial(_sdpa_unsupported_reason, max_head_dim=256, can_use=can_use_flash_attention),
        partial(_load_sdpa, SDPBackend.FLASH_ATTENTION),
    ),
    Backend("reference", lambda shape: None, _load_reference),
)
"""Every backend, on Hopper and later the one expected to be fastest first."""


def backends_for(device: torch.device) -> tuple[Backend, ...]:
    """`BACKENDS` in the order of what is expected of them on a device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0):
        return BACKENDS
    *packages, cudnn, flash, reference = BACKENDS
    return *packages, flash, cudnn, reference
