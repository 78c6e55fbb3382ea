"""Every launch of training the recipes: all variants of all operators, forward and backward."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.rehearsal.case import CONFIGS, RECIPES
from fastllama.config import Config, ModelConfig, load_recipe
from fastllama_kernels import TRITON
from fastllama_kernels.linear_cross_entropy import SCALED_BLOCK, add_scaled_, scaled

DTYPE = torch.bfloat16
# Training only has counts divisible by 16; Triton specialises on that.
SEQ_LEN = 16
LOSS_OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}

Operator = Callable[[ModelConfig, int], None]


def recipes() -> list[Config]:
    """The recipes for a GPU, narrow models first."""
    configs = [load_recipe(CONFIGS / f"{name}.toml") for name in RECIPES]
    return sorted(configs, key=lambda config: (config.model.n_embd, config.model.ffn_width))


def models() -> list[ModelConfig]:
    """The distinct models of the recipes, narrow ones first."""
    return list(dict.fromkeys(config.model for config in recipes()))


def _train_rms_norm(model: ModelConfig, n_rows: int) -> None:
    x, weight = _leaf(n_rows, model.n_embd), _leaf(model.n_embd)
    projection = _leaf(n_rows, model.n_embd)
    for residual in (None, _leaf(n_rows, model.n_embd)):
        _backward(*TRITON.add_rms_norm(x, residual, weight, model.eps))
        _backward(*TRITON.add_rms_norm_linear(x, residual, weight, model.eps, projection))


def _train_rope(model: ModelConfig, n_rows: int) -> None:
    shape = n_rows // SEQ_LEN, SEQ_LEN
    qkv = _leaf(*shape, (model.n_heads + 2 * model.kv_heads) * model.head_width)
    table = torch.ones(SEQ_LEN, model.head_width // 2)
    for positions in (None, torch.zeros(shape, dtype=torch.int64)):
        _backward(*TRITON.rope(qkv, table, table, model.n_heads, model.kv_heads, positions))


def _train_swiglu(model: ModelConfig, n_rows: int) -> None:
    gate_up, down = _leaf(n_rows, 2 * model.ffn_width), _leaf(n_rows, model.ffn_width)
    _backward(TRITON.swiglu(gate_up))
    _backward(TRITON.swiglu_linear(gate_up, down))


def _train_cross_entropy(model: ModelConfig, n_rows: int, **options: float) -> None:
    targets = torch.zeros(n_rows, dtype=torch.int64)
    for inplace, reduction in product((False, True), ("mean", "none")):
        logits = _leaf(n_rows, model.vocab_size)
        loss, _ = TRITON.cross_entropy(
            logits, targets, reduction=reduction, inplace=inplace, **options
        )
        _backward(loss)


def _train_linear_cross_entropy(model: ModelConfig, n_rows: int, **options: float) -> None:
    # The width of hidden only matters to PyTorch's matmuls, not to a kernel.
    hidden, weight = _leaf(n_rows, 16), _leaf(model.vocab_size, 16)
    targets = torch.zeros(n_rows, dtype=torch.int64)
    for main_grad in (None, torch.zeros(weight.shape)):
        loss = TRITON.linear_cross_entropy(hidden, weight, targets, main_grad=main_grad, **options)
        _backward(loss)


def _scale(model: ModelConfig, n_rows: int) -> None:
    """What the backward of linear_cross_entropy does to its gradients; a row is a block."""
    scale, gradient = torch.ones(()), torch.ones(n_rows, SCALED_BLOCK)
    scaled(gradient.to(DTYPE), scale, DTYPE)
    scaled(gradient, scale, DTYPE)
    add_scaled_(torch.zeros_like(gradient), gradient, scale)


OPERATORS: tuple[Operator, ...] = (
    _train_rms_norm,
    _train_rope,
    _train_swiglu,
    _train_cross_entropy,
    _scale,
    _train_linear_cross_entropy,
)
"""One function per operator: runs it as the recipes do, forward and backward, at a model's widths,
on a number of rows. Rope needs a multiple of SEQ_LEN."""

WITH_OPTIONS: tuple[Operator, ...] = (
    partial(_train_cross_entropy, **LOSS_OPTIONS),
    partial(_train_linear_cross_entropy, **LOSS_OPTIONS),
)
"""The losses again, with options that no recipe sets."""


def _leaf(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=DTYPE, requires_grad=True)


def _backward(*outputs: Tensor) -> None:
    # Not 1, with which the backward of a loss in place does nothing.
    torch.autograd.backward(outputs, [torch.full_like(output, 2) for output in outputs])


_SIZES = ("D", "F", "V", "H", "G", "N_ROTATED_HEADS", "R")
_SWITCHES = ("HAS_RESIDUAL", "HAS_DSTREAM", "RECOMPUTE", "WRITE_GRADIENT", "ADDS", "SOFTCAP")
_TENSORS = ("n_valid_ptr", "positions_ptr")


def label(kernel: str, constants: Mapping[str, Any], pointers: Mapping[str, str]) -> str:
    """Name a launch by what matters of it: `rms_norm_fwd, D 2048, HAS_RESIDUAL`.

    `constants` are constexpr parameters by name, `pointers` the dtypes of tensors.
    """
    words = [kernel.strip("_").removesuffix("_kernel")]
    words += [f"{name} {constants[name]}" for name in _SIZES if name in constants]
    if constants.get("SCALE_STRIDE") is not None:
        words.append("a scale per row" if constants["SCALE_STRIDE"] else "one scale")
    if "out_ptr" in pointers:
        words.append(f"{pointers['x_ptr']} to {pointers['out_ptr']}")
    words += [name for name in _SWITCHES if constants.get(name)]
    words += [name.removesuffix("_ptr") for name in _TENSORS if name in pointers]
    return ", ".join(words)
