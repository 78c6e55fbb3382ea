"""Operators of other libraries, with the signatures of `fastllama_kernels`.

    rms_norm(x, weight, eps) -> y
    add_rms_norm(x, residual, weight, eps) -> (y, stream)
    rope(qkv_BTE, cos_PR, sin_PR, n_heads, n_kv_heads) -> (q_BTHK, k_BTGK, v_BTGK)
    swiglu(gate_up) -> h
    cross_entropy(logits_NV, targets_N) -> mean loss
    linear_cross_entropy(hidden_ND, weight_VD, targets_N) -> mean loss
    add_rms_norm_linear, swiglu_linear: followed by a matmul, as in `fastllama_kernels`

All arguments are positional. Every library runs with its defaults. The docstrings below name each
default that costs accuracy.

Written against Liger-Kernel 0.8.5, QuACK 0.6.5, flash-attn 2.8.3, cut-cross-entropy 25.1.1 and
PyTorch 2.13.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.operators.case import Operator, Provider

Factory = Callable[[], Operator]


def eager_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """PyTorch's native kernel."""
    return F.rms_norm(x, weight.shape, weight, eps)


def eager_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Two kernels: the residual add, then PyTorch's native RMSNorm."""
    stream = residual + x
    return F.rms_norm(stream, weight.shape, weight, eps), stream


def eager_rope(
    qkv_BTE: Tensor, cos_PR: Tensor, sin_PR: Tensor, n_heads: int, n_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As in Hugging Face's Llama: computed in the input dtype, with the tables rounded to it."""
    heads = qkv_BTE.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))
    q_BTHK, k_BTGK, v_BTGK = heads.split((n_heads, n_kv_heads, n_kv_heads), dim=2)
    cos, sin = (
        torch.cat((table, table), dim=-1)[: qkv_BTE.shape[1], None].to(qkv_BTE.dtype)
        for table in (cos_PR, sin_PR)
    )
    return (
        q_BTHK * cos + _rotate_half(q_BTHK) * sin,
        k_BTGK * cos + _rotate_half(k_BTGK) * sin,
        v_BTGK,
    )


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def eager_add_rms_norm_linear(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, projection: Tensor
) -> tuple[Tensor, Tensor]:
    """`eager_add_rms_norm` and a linear layer. Autograd saves y for the weight gradient."""
    y, stream = eager_add_rms_norm(x, residual, weight, eps)
    return F.linear(y, projection), stream


def eager_swiglu(gate_up: Tensor) -> Tensor:
    """Two kernels; silu(gate) is rounded between them."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def eager_swiglu_linear(gate_up: Tensor, down: Tensor) -> Tensor:
    """`eager_swiglu` and a linear layer. Autograd saves h for the weight gradient."""
    return F.linear(eager_swiglu(gate_up), down)


def eager_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Converts the logits to float32 first."""
    return F.cross_entropy(logits_NV.float(), targets_N)


def eager_linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Materialises all logits, and a float32 copy of them."""
    return F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), targets_N)


EAGER: Mapping[str, Operator] = {
    "rms_norm": eager_rms_norm,
    "add_rms_norm": eager_add_rms_norm,
    "add_rms_norm_linear": eager_add_rms_norm_linear,
    "rope": eager_rope,
    "swiglu": eager_swiglu,
    "swiglu_linear": eager_swiglu_linear,
    "cross_entropy": eager_cross_entropy,
    "linear_cross_entropy": eager_linear_cross_entropy,
}
"""Idiomatic plain PyTorch."""


def compiled(operator: Operator) -> Operator:
    """Compile `operator` with Inductor for each shape, with a backward that can run repeatedly.

    Disables donated buffers for the whole process.
    """
    from torch._functorch import config

    # By default a compiled backward reuses the memory of its saved tensors and refuses to run
    # twice. The option is read at compile time and again when the backward runs. On a GPU the
    # backward runs in an autograd thread, which since PyTorch 2.13 sees the default, not the value.
    config.donated_buffer = False
    config._config["donated_buffer"].default = False  # type: ignore[attr-defined]
    # Dynamo counts compilations per code object and stops after eight. Reset the count for each
    # new operator. With fullgraph a ninth shape raises and does not silently run eagerly.
    torch._dynamo.reset_code(operator.__code__)
    return torch.compile(operator, fullgraph=True, dynamic=False)


def pytorch_linear_cross_entropy() -> Operator:
    """Chunked; the forward computes the gradients. The loss has the dtype of hidden."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    # By default the backward works in place and runs only once. This makes it allocate its results.
    options = LinearCrossEntropyOptions(allow_retain_graph=True)

    def operator(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_ND, weight_VD, targets_N, options=options)

    return operator


def liger_rms_norm() -> Operator:
    """Llama casting mode: rounds before multiplying by the weight. dx overwrites dy."""
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm


def liger_add_rms_norm() -> Operator:
    """Llama casting mode: rounds before multiplying by the weight. dx overwrites dy."""
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return liger_fused_add_rms_norm


def liger_rope() -> Operator:
    """Works on (B, heads, T, K): copies q and k out of the packed projection, then rotates them.

    The backward rotates dq and dk in place.
    """
    from liger_kernel.transformers.functional import liger_rope

    def operator(
        qkv_BTE: Tensor, cos_PR: Tensor, sin_PR: Tensor, n_heads: int, n_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv_BTE.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))
        q_BTHK, k_BTGK, v_BTGK = heads.split((n_heads, n_kv_heads, n_kv_heads), dim=2)
        q_BHTK, k_BGTK = liger_rope(
            q_BTHK.transpose(1, 2),
            k_BTGK.transpose(1, 2),
            cos_PR,
            sin_PR,
            # Required because our tables hold each angle only once.
            rotary_dim=2 * cos_PR.shape[-1],
        )
        return q_BHTK.transpose(1, 2), k_BGTK.transpose(1, 2), v_BTGK

    return operator


def liger_swiglu() -> Operator:
    """Variant for a packed projection. silu(gate) is rounded before the multiplication by up."""
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

    def operator(gate_up: Tensor) -> Tensor:
        # Its gradient is always two-dimensional.
        h: Tensor = LigerFusedGateUpSiLUMulFunction.apply(gate_up.flatten(0, -2))
        return h.unflatten(0, gate_up.shape[:-1])

    return operator


def liger_cross_entropy() -> Operator:
    """The forward overwrites the logits with their gradient; the backward scales it in place.

    The loss has the dtype of the logits. The host reads the number of targets, and checks whether
    the upstream gradient is 1.
    """
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy


def liger_linear_cross_entropy() -> Operator:
    """Chunked; the forward computes the gradients and the backward scales them in place.

    The weight gradient accumulates in the dtype of the weight. Waits for the host like
    `liger_cross_entropy`.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def quack_rms_norm() -> Operator:
    """One CuTe kernel per pass."""
    from quack.rmsnorm import rmsnorm

    def operator(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rmsnorm(x, weight, eps=eps)

    return operator


def quack_add_rms_norm() -> Operator:
    """The residual stream keeps the dtype of `residual`."""
    from quack.rmsnorm import rmsnorm

    def operator(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)

    return operator


def quack_rope() -> Operator:
    """Rotates queries and keys of the packed projection in place. K must be a multiple of 8."""
    from quack.rotary import apply_rotary_emb_qkv_

    def operator(
        qkv_BTE: Tensor, cos_PR: Tensor, sin_PR: Tensor, n_heads: int, n_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = 2 * cos_PR.shape[-1]
        qkv_BTE = apply_rotary_emb_qkv_(qkv_BTE, cos_PR, sin_PR, num_heads_q=n_heads, headdim=width)
        heads = qkv_BTE.unflatten(-1, (n_heads + 2 * n_kv_heads, width))
        return heads.split((n_heads, n_kv_heads, n_kv_heads), dim=2)

    return operator


def quack_cross_entropy() -> Operator:
    """The backward computes the gradient in a new tensor."""
    from quack.cross_entropy import cross_entropy

    return cross_entropy


def quack_linear_cross_entropy() -> Operator:
    """Chunked; the forward computes the gradients and the backward scales them in place.

    In bfloat16 on Hopper it stores exponentials instead of logits. The weight gradient accumulates
    in float32. The first call autotunes the matmuls. N must be a multiple of 8.
    """
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def flash_attn_rms_norm() -> Operator:
    """Tri Dao's Triton kernel. The weight stays in registers up to 8,192 columns."""
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    def operator(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm_fn(x, weight, None, eps=eps)

    return operator


def flash_attn_add_rms_norm() -> Operator:
    """The residual stream keeps the dtype of `residual`; y is computed from the unrounded sum."""
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    def operator(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return rms_norm_fn(x, weight, None, residual=residual, eps=eps, prenorm=True)

    return operator


def flash_attn_rope() -> Operator:
    """Rotates queries and keys of the packed projection in place."""
    from flash_attn.layers.rotary import apply_rotary_emb_qkv_

    def operator(
        qkv_BTE: Tensor, cos_PR: Tensor, sin_PR: Tensor, n_heads: int, n_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv_BTE.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))
        heads = apply_rotary_emb_qkv_(heads, cos_PR, sin_PR, num_heads_q=n_heads)
        return heads.split((n_heads, n_kv_heads, n_kv_heads), dim=2)

    return operator


def flash_attn_swiglu() -> Operator:
    """An elementwise CUDA kernel on the strided halves. Autograd then packs the two gradients."""
    from flash_attn.ops.activations import swiglu

    def operator(gate_up: Tensor) -> Tensor:
        return swiglu(*gate_up.chunk(2, dim=-1))

    return operator


def flash_attn_cross_entropy() -> Operator:
    """Mean as in `flash_attn.losses`. The backward computes the gradient in a new tensor."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def operator(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        losses_N, _ = cross_entropy_loss(logits_NV, targets_N)
        return losses_N.sum() / (targets_N != -100).sum()

    return operator


def cce_linear_cross_entropy() -> Operator:
    """Never stores logits. The backward skips blocks with negligible gradients.

    The host reads the list of targets that are not ignored.
    """
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _eager(operator: str) -> Provider:
    return Provider("eager", "torch", lambda: EAGER[operator])


def _compiled(operator: str) -> Provider:
    return Provider("compiled", "torch", lambda: compiled(EAGER[operator]))


def _liger(make: Factory, **traits: Any) -> Provider:
    return Provider("liger", "liger-kernel", make, **traits)


def _quack(make: Factory, **traits: Any) -> Provider:
    return Provider("quack", "quack-kernels", make, **traits)


def _flash_attn(make: Factory, **traits: Any) -> Provider:
    return Provider("flash-attn", "flash-attn", make, **traits)


LIBRARIES: Mapping[str, tuple[Provider, ...]] = {
    "rms_norm": (
        _liger(liger_rms_norm),
        _quack(quack_rms_norm),
        _flash_attn(flash_attn_rms_norm),
    ),
    "add_rms_norm": (
        _liger(liger_add_rms_norm),
        _quack(quack_add_rms_norm),
        _flash_attn(flash_attn_add_rms_norm),
    ),
    "rope": (
        _liger(liger_rope),
        _quack(quack_rope),
        _flash_attn(flash_attn_rope),
    ),
    "swiglu": (
        _liger(liger_swiglu),
        _flash_attn(flash_attn_swiglu),
    ),
    "cross_entropy": (
        _liger(liger_cross_entropy, waits_for_host=True),
        _quack(quack_cross_entropy),
        _flash_attn(flash_attn_cross_entropy),
    ),
    "linear_cross_entropy": (
        Provider("pytorch", "torch", pytorch_linear_cross_entropy),
        _liger(liger_linear_cross_entropy, waits_for_host=True),
        _quack(quack_linear_cross_entropy),
        Provider(
            "cce",
            "cut-cross-entropy",
            cce_linear_cross_entropy,
            waits_for_host=True,
            dtypes=(torch.bfloat16, torch.float16),
        ),
    ),
}


def peers(operator: str) -> list[Provider]:
    """Providers of `operator`: plain PyTorch first, then the libraries."""
    return [_eager(operator), _compiled(operator), *LIBRARIES.get(operator, ())]
