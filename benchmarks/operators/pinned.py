"""Pinned kernel configurations, and the launches of a training step that use them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.operators.case import Work, randn
from fastllama.config import ModelConfig
from fastllama_kernels._softmax import maximum_and_log_sum

# The package exports operators under the names of their modules.
cross_entropy, linear_cross_entropy, rms_norm, rope, swiglu = (
    import_module(f"fastllama_kernels.{name}")
    for name in ("cross_entropy", "linear_cross_entropy", "rms_norm", "rope", "swiglu")
)

LaunchConfig = dict[str, int]
DTYPE = torch.bfloat16
EPS = 1e-5
# ignore_index, label_smoothing, z_loss, softcap.
LOSS_OPTIONS = (-100, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Pinned:
    """One kernel configuration, which functions of the kernel's file compute from model sizes."""

    name: str
    module: ModuleType
    functions: tuple[str, ...]
    """Names in `module`. A function returns launch options, or one option of the same name."""
    sizes: Callable[[ModelConfig, int], tuple[int, ...]]
    """Arguments of these functions, for a model and a number of tokens."""
    inputs: Callable[[ModelConfig, int, torch.Generator], tuple[Any, ...]]
    launch: Callable[..., list[Tensor]]
    """Launches this configuration as a training step does, and returns everything it wrote."""
    work: Callable[[ModelConfig, int], Work]
    """Minimal work of `launch`."""

    def config(self, model: ModelConfig, n_tokens: int) -> LaunchConfig:
        """Current configuration for `model` and `n_tokens`."""
        config: LaunchConfig = {}
        for name in self.functions:
            part = getattr(self.module, name)(*self.sizes(model, n_tokens))
            config |= part if isinstance(part, dict) else {name: part}
        return config

    @contextmanager
    def replaced_by(self, config: LaunchConfig) -> Iterator[None]:
        """Make every launch use `config`, which has the same keys as the pinned configuration."""
        before = {name: getattr(self.module, name) for name in self.functions}
        options = {name: value for name, value in config.items() if name not in before}
        for name in before:
            part = config.get(name, options)
            setattr(self.module, name, lambda *_, part=part: part)
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(self.module, name, function)


def _norm_inputs(model: ModelConfig, n: int, generator: torch.Generator) -> tuple[Any, ...]:
    x, residual = (randn(generator, DTYPE, n, model.n_embd).detach() for _ in range(2))
    return x, residual, randn(generator, DTYPE, model.n_embd).detach(), EPS


def _norm_backward_inputs(
    model: ModelConfig, n: int, generator: torch.Generator
) -> tuple[Any, ...]:
    dy, stream, weight, _ = _norm_inputs(model, n, generator)
    dstream = randn(generator, DTYPE, n, model.n_embd).detach()
    return dy, dstream, stream, weight, EPS


def _rope_inputs(model: ModelConfig, n: int, generator: torch.Generator) -> tuple[Any, ...]:
    seq_len = min(model.max_seq_len, n)
    shape = (n // seq_len, seq_len)
    width = (model.n_heads + 2 * model.kv_heads) * model.head_width
    dq, dk, dv = (
        randn(generator, DTYPE, *shape, heads, model.head_width).detach()
        for heads in (model.n_heads, model.kv_heads, model.kv_heads)
    )
    angles = torch.randn(
        seq_len, model.head_width // 2, generator=generator, device=generator.device
    )
    return randn(generator, DTYPE, *shape, width).detach(), dq, dk, dv, angles.cos(), angles.sin()


def _rotate_fwd_bwd(
    qkv: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor
) -> list[Tensor]:
    rope.rope_(qkv, cos, sin, None, dq.shape[2], dk.shape[2])
    return [qkv, rope.rope_bwd(dq, dk, dv, cos, sin, None)]


def _swiglu_inputs(model: ModelConfig, n: int, generator: torch.Generator) -> tuple[Any, ...]:
    gate_up = randn(generator, DTYPE, n, 2 * model.ffn_width).detach()
    return gate_up, randn(generator, DTYPE, n, model.ffn_width).detach()


def _swiglu_fwd_bwd(gate_up: Tensor, dh: Tensor) -> list[Tensor]:
    return [swiglu.swiglu_fwd(gate_up), *swiglu.swiglu_recompute_bwd(dh, gate_up)]


def _logits(model: ModelConfig, n: int, generator: torch.Generator) -> tuple[Any, ...]:
    logits = randn(generator, DTYPE, n, model.vocab_size).detach()
    return logits, _targets(model, n, generator)


def _targets(model: ModelConfig, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(model.vocab_size, (n,), generator=generator, device=generator.device)


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> list[Tensor]:
    results = cross_entropy.cross_entropy_gradient_fwd_(logits, targets, None, *LOSS_OPTIONS)
    return [*results, logits]


def _logits_and_upstream(model: ModelConfig, n: int, generator: torch.Generator) -> tuple[Any, ...]:
    logits, targets = _logits(model, n, generator)
    dlosses, dlse = torch.randn(2, n, generator=generator, device=generator.device)
    maximum, log_sum = maximum_and_log_sum(logits.float())
    return dlosses, dlse, logits, targets, maximum, log_sum


def _hidden(model: ModelConfig, n: int, generator: torch.Generator) -> tuple[Any, ...]:
    hidden = randn(generator, DTYPE, n, model.n_embd).detach()
    weight = randn(generator, DTYPE, model.vocab_size, model.n_embd).detach()
    return hidden, weight * model.n_embd**-0.5, _targets(model, n, generator)


def _activations(copies: int) -> Callable[[ModelConfig, int], Work]:
    return lambda model, n: Work(copies * n * model.n_embd * DTYPE.itemsize)


def _rope_work(model: ModelConfig, n: int) -> Work:
    rotated, packed = model.n_heads + model.kv_heads, model.n_heads + 2 * model.kv_heads
    return Work(2 * (rotated + packed) * model.head_width * n * DTYPE.itemsize)


def _logits_work(model: ModelConfig, n: int) -> Work:
    return Work(2 * n * model.vocab_size * DTYPE.itemsize)


def _loss_work(model: ModelConfig, n: int) -> Work:
    gradient = 4 * model.vocab_size * model.n_embd
    return _logits_work(model, n) + Work(gradient, 6 * n * model.vocab_size * model.n_embd)


PINNED = (
    Pinned(
        name="rms_norm forward",
        module=rms_norm,
        functions=("forward_config",),
        sizes=lambda model, _: (model.n_embd,),
        inputs=_norm_inputs,
        launch=lambda *inputs: list(rms_norm.add_rms_norm_fwd(*inputs)),
        work=_activations(4),
    ),
    Pinned(
        name="rms_norm backward",
        module=rms_norm,
        functions=("backward_config", "programs_per_multiprocessor"),
        sizes=lambda model, _: (model.n_embd,),
        inputs=_norm_backward_inputs,
        launch=lambda *inputs: list(rms_norm.rms_norm_recompute_bwd(*inputs)),
        work=_activations(5),
    ),
    Pinned(
        name="rope",
        module=rope,
        functions=("launch_config",),
        sizes=lambda model, _: (model.head_width // 2, model.n_heads, model.kv_heads),
        inputs=_rope_inputs,
        launch=_rotate_fwd_bwd,
        work=_rope_work,
    ),
    Pinned(
        name="swiglu",
        module=swiglu,
        functions=("launch_config",),
        sizes=lambda model, _: (model.ffn_width,),
        inputs=_swiglu_inputs,
        launch=_swiglu_fwd_bwd,
        work=lambda model, n: Work(9 * n * model.ffn_width * DTYPE.itemsize),
    ),
    Pinned(
        name="linear_cross_entropy",
        module=linear_cross_entropy,
        functions=("chunk_length",),
        sizes=lambda model, n: (n, model.vocab_size, DTYPE.itemsize),
        inputs=_hidden,
        launch=lambda *inputs: list(
            linear_cross_entropy.linear_cross_entropy_fwd(*inputs, *LOSS_OPTIONS, True, True)
        ),
        work=_loss_work,
    ),
    Pinned(
        name="cross_entropy forward",
        module=cross_entropy,
        functions=("forward_config",),
        sizes=lambda model, _: (model.vocab_size, True, False),
        inputs=_logits,
        launch=_loss_and_gradient,
        work=_logits_work,
    ),
    Pinned(
        name="cross_entropy backward",
        module=cross_entropy,
        functions=("elementwise_config",),
        sizes=lambda model, _: (model.vocab_size,),
        inputs=_logits_and_upstream,
        launch=lambda *inputs: [cross_entropy.cross_entropy_bwd(*inputs, *LOSS_OPTIONS)],
        work=_logits_work,
    ),
)
