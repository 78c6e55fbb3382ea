"""Attention backends; all have the signature of `attention_reference`.

| name         | one document per sequence                | packed documents              |
|--------------|------------------------------------------|-------------------------------|
| flash-attn-3 | PyTorch SDPA over FlashAttention 3       | varlen_attn over the same     |
| flash-attn-4 | PyTorch SDPA over FlashAttention 4, CuTe | varlen_attn over the same     |
| flash-attn-2 | flash_attn_func                          | flash_attn_varlen_func        |
| cudnn        | PyTorch SDPA, cuDNN                      | as flash; never chosen        |
| flash        | PyTorch SDPA, its own FlashAttention 2   | varlen_attn over the same     |
| matmul       | attention_by_matmuls, on a CPU           | the same, with a mask         |
| reference    | attention                                | attention, with a mask        |

SDPA is pinned to one kernel: an unsupported shape raises an error and never runs on a slower
kernel. Training, T == S > 1, runs on the backend's kernel. Decoding, T != S or T == 1, runs on
`attention_without_cudnn`. The shape alone decides. cuDNN never gets a mask, because it returns NaN
for masks at some lengths (https://github.com/pytorch/pytorch/issues/196678). It never decodes,
because it would build a plan for every number of keys.
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

from fastllama_kernels.attention import (
    attention,
    attention_by_matmuls,
    attention_without_cudnn,
)

Attention = Callable[..., Tensor]
Dense = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
Packed = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]

MISSING = "is not installed"
"""In the reason of a backend whose package is missing."""
_AMPERE_AND_NEWER = range(8, 100)
# PyTorch 2.11 accepts grouped heads without the argument.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


@dataclass(frozen=True)
class AttentionShape:
    """The attention call of a training step: causal, T == S."""

    batch_size: int
    seq_len: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    n_documents: int | None = None
    """Documents that `cu_seqlens` has room for; None if documents are not kept apart."""


@dataclass(frozen=True)
class Backend:
    """One implementation of attention."""

    name: str
    """The value of `training.attention`."""
    unsupported_reason: Callable[[AttentionShape], str | None]
    """Why this machine cannot run the shape, as a clause about "it"; None where it can."""
    load: Callable[[], Attention]
    """Imports the packages, sets PyTorch's FlashAttention implementation, returns the operator.

    PyTorch has one implementation per process. After two loads, every operator on PyTorch's flash
    kernels runs the implementation of the last load.
    """


def fused_attention(dense: Dense, packed: Packed) -> Attention:
    """Build the operator from the two entry points of a library.

    Args:
        dense: maps (q (B, T, H, K), k, v (B, T, G, K), causal) to (B, T, H, K).
        packed: maps (q (N, H, K), k, v (N, G, K), cu_seqlens, T, causal) to (N, H, K).
    """

    def fused(
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
            out_NHK = packed(q_NHK, k_NGK, v_NGK, cu_seqlens, n_queries, causal)
            out_BTHK = out_NHK.unflatten(0, (batch_size, n_queries))
        out: Tensor = _ContiguousGradient.apply(out_BTHK)
        return out

    return fused


class _ContiguousGradient(torch.autograd.Function):
    """Identity that makes its gradient contiguous.

    An expanded gradient has strides of 0, which some kernels do not support. The gradient from a
    projection is contiguous already and is not copied.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def pinned_sdpa(kernel: SDPBackend) -> Attention:
    """Return attention on one SDPA kernel; packed documents run on PyTorch's flash kernel."""

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
        cu_seqlens: Tensor,
        max_seqlen: int,
        causal: bool,
    ) -> Tensor:
        window = (-1, 0 if causal else -1)
        # Newer PyTorch prefers cuDNN here; cuDNN is untested on documents of length 0.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out_NHK = varlen_attn(
                q_NHK,
                k_NGK,
                v_NGK,
                cu_seqlens,
                cu_seqlens,
                max_seqlen,
                max_seqlen,
                window_size=window,
                **_GROUPED,
            )
        return cast(Tensor, out_NHK)

    return fused_attention(dense, packed)


def set_flash_implementation(name: str | None) -> None:
    """Set the FlashAttention that PyTorch runs: "FA3", "FA4", or None for its own."""
    if name is None:
        if current_flash_attention_impl() is not None:
            restore_flash_attention_impl()
        return
    with warnings.catch_warnings():
        # PyTorch warns about the override we ask for.
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
        cu_seqlens: Tensor,
        max_seqlen: int,
        causal: bool,
    ) -> Tensor:
        out_NHK: Tensor = flash_attn_varlen(
            q_NHK,
            k_NGK,
            v_NGK,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out_NHK

    return fused_attention(dense, packed)


def _load_plain(operator: Attention) -> Attention:
    set_flash_implementation(None)
    return operator


def _matmul_unsupported_reason(shape: AttentionShape) -> str | None:
    if shape.device.type != "cpu":
        return f"it is for CPUs, not {shape.device.type}"
    return None


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
    missing = f"the package {module} {MISSING} ({remedy})"
    try:
        imported = import_module(module)
    except ModuleNotFoundError as error:
        # The missing module may be a dependency of the package.
        return missing if module.startswith(str(error.name)) else _broken(module, error)
    except Exception as error:  # A package built for another PyTorch may raise anything.
        return _broken(module, error)
    # With FlashAttention 4 alone, flash_attn is the empty parent of flash_attn.cute.
    return None if hasattr(imported, attribute) else missing


def _broken(module: str, error: Exception) -> str:
    return f"the package {module} cannot be imported ({first_line(error)})"


def first_line(error: Exception) -> str:
    """Format an exception as `Type: first line of its message`."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _sdpa_unsupported_reason(
    shape: AttentionShape,
    *,
    max_head_dim: int,
    can_use: Callable[[SDPAParams, bool], bool],
) -> str | None:
    reason = _gpu_unsupported_reason(shape, _AMPERE_AND_NEWER, max_head_dim)
    return reason or _pytorch_unsupported_reason(shape, can_use)


def _pytorch_unsupported_reason(
    shape: AttentionShape, can_use: Callable[[SDPAParams, bool], bool]
) -> str | None:
    """Ask PyTorch, which checks its build, cuDNN's version and the deterministic mode.

    PyTorch looks only at shapes, strides and dtypes, so one expanded row stands for the inputs.
    """
    row_K = torch.empty(shape.head_dim, dtype=shape.dtype, device=shape.device, requires_grad=True)
    q_BHTK, k_BGTK = (
        row_K.expand(shape.batch_size, n_heads, shape.seq_len, -1)
        for n_heads in (shape.n_heads, shape.n_kv_heads)
    )
    grouped = shape.n_heads != shape.n_kv_heads
    params = SDPAParams(q_BHTK, k_BGTK, k_BGTK, None, 0.0, True, grouped)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if can_use(params, True):
            return None
    reasons = "; ".join(str(warning.message).partition(" (Triggered")[0] for warning in caught)
    return f"PyTorch refuses it ({reasons or 'without a reason'})"


def _cudnn_unsupported_reason(shape: AttentionShape) -> str | None:
    if shape.n_documents is not None:
        return "it has no kernel for packed documents"
    return _sdpa_unsupported_reason(shape, max_head_dim=128, can_use=can_use_cudnn_attention)


def _flash_attn_4_unsupported_reason(shape: AttentionShape) -> str | None:
    return _package_unsupported_reason(
        shape,
        majors=range(9, 11),
        # With wider heads a document of length 0 ends the process, in release 4.0.0b13
        # (https://github.com/Dao-AILab/flash-attention/issues/2562).
        max_head_dim=256 if shape.n_documents is None else 128,
        module="flash_attn.cute.interface",
        attribute="_flash_attn_fwd",
        remedy="pip install flash-attn-4",
    )


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
        _flash_attn_4_unsupported_reason,
        partial(_load_sdpa, SDPBackend.FLASH_ATTENTION, flash="FA4"),
    ),
    Backend(
        "flash-attn-2",
        partial(
            _package_unsupported_reason,
            majors=_AMPERE_AND_NEWER,
            max_head_dim=256,
            module="flash_attn",
            attribute="flash_attn_func",
            remedy="pip install --no-build-isolation 'fastllama[flash]'",
        ),
        _load_flash_attn_2,
    ),
    Backend(
        "cudnn",
        _cudnn_unsupported_reason,
        partial(_load_sdpa, SDPBackend.CUDNN_ATTENTION),
    ),
    Backend(
        "flash",
        partial(_sdpa_unsupported_reason, max_head_dim=256, can_use=can_use_flash_attention),
        partial(_load_sdpa, SDPBackend.FLASH_ATTENTION),
    ),
    Backend("matmul", _matmul_unsupported_reason, partial(_load_plain, attention_by_matmuls)),
    Backend("reference", lambda shape: None, partial(_load_plain, attention)),
)
"""Every backend, ordered by expected speed on Hopper and newer, fastest first."""


def backends_for(device: torch.device) -> tuple[Backend, ...]:
    """The backends to choose from by speed on `device`, by expected speed, fastest first.

    "matmul" is not among them: it is fast only inside a compiled graph.
    """
    *fused, _, reference = BACKENDS
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        *packages, cudnn, flash = fused
        fused = [*packages, flash, cudnn]
    return *fused, reference
