"""Liger's kernels, compiled and counted in the same way, where liger-kernel is installed."""

from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch

from benchmarks.counts.budget import MULTIPROCESSORS, Count, Work, chunk_rows, count, tokens
from benchmarks.counts.compiled import Launch, compile_launch, compilers, record
from benchmarks.counts.launches import DTYPE, SEQ_LEN, recipes
from fastllama.config import Config, ModelConfig

ARCHITECTURE = 90
B = DTYPE.itemsize


def count_liger() -> list[Count]:
    """Count the launches of Liger that do what ours do, at the widths of the recipes, on an H100.

    Bytes are not recorded.

    Raises:
        ModuleNotFoundError: liger-kernel is not installed.
    """
    import_module("liger_kernel.ops")
    with compilers() as pool:
        found: dict[str, tuple[Launch, Work]] = {}
        for config in recipes():
            launches = pool.submit(_record, config.model).result()
            for launch, (label, work) in zip(launches, _works(config).items(), strict=True):
                found[label] = launch, work
        kernels = list(pool.map(compile_launch, [launch for launch, _ in found.values()]))
    return [
        replace(count(kernel, work), label=label, moved=float("nan"))
        for kernel, (label, (_, work)) in zip(kernels, found.items(), strict=True)
    ]


def _record(model: ModelConfig) -> list[Launch]:
    return record(partial(_train, model), ARCHITECTURE)


def _train(model: ModelConfig) -> None:
    """Launch in the order of `_works`."""
    norm, add_norm, rope, swiglu, loss = (
        import_module(f"liger_kernel.ops.{name}")
        for name in ("rms_norm", "fused_add_rms_norm", "rope", "swiglu", "cross_entropy")
    )

    def ones(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype)

    x, weight = ones(SEQ_LEN, model.n_embd), ones(model.n_embd)
    _, _, rstd, *settings, mode = norm.rms_norm_forward(x, weight, 1e-5, 0.0, "llama", None)
    norm.rms_norm_backward(x, x, weight, rstd, 0.0, mode, *settings, False, None)
    added: Any = add_norm.fused_add_rms_norm_forward(x, x, weight, 1e-5, 0.0, "llama")
    _, stream, rstd, *settings, mode = added
    add_norm.fused_add_rms_norm_backward(x, x, stream, weight, rstd, 0.0, mode, *settings, False)
    gate = ones(SEQ_LEN, model.ffn_width)
    swiglu.swiglu_forward(gate, gate)
    swiglu.swiglu_backward(gate, gate, gate)
    q, k = (ones(1, n, SEQ_LEN, model.head_width) for n in (model.n_heads, model.kv_heads))
    table = ones(1, SEQ_LEN, model.head_width, dtype=torch.float32)
    rope.rope_forward(q, k, table, table)
    rope.rope_backward(q, k, table, table)
    logits = ones(SEQ_LEN, model.vocab_size).requires_grad_()
    targets = torch.zeros(SEQ_LEN, dtype=torch.int64)
    loss.cross_entropy_forward(logits, targets, None, -100, 0.0, 0.0, "mean", None, False)


def _works(config: Config) -> dict[str, Work]:
    """What each launch of `_train` does, by its name."""
    model, n_rows, programs = config.model, tokens(config), MULTIPROCESSORS[ARCHITECTURE]
    width, heads = model.n_embd * B, (model.n_heads + model.kv_heads) * model.head_width * B
    logits, ffn, d = model.vocab_size * B, model.ffn_width * B, f"D {model.n_embd}"
    rotated = f"H {model.n_heads}, G {model.kv_heads}, R {model.head_width // 2}"
    looped = partial(Work, rows=n_rows / programs, programs=programs, n_rows=n_rows)
    return {
        f"rms_norm_fwd, {d}": Work(2 * width, rows=1),
        f"rms_norm_bwd, {d}": looped(3 * width),
        f"rms_norm_fwd, {d}, HAS_RESIDUAL": Work(4 * width, rows=1),
        f"rms_norm_bwd, {d}, HAS_DSTREAM": looped(4 * width),
        f"swiglu_fwd, F {model.ffn_width}": Work(3 * ffn, rows=1),
        f"swiglu_bwd, F {model.ffn_width}": Work(5 * ffn, rows=1),
        f"rope, {rotated}": Work(2 * heads, rows=1),
        f"rope_bwd, {rotated}, without packing": Work(2 * heads, rows=1),
        f"cross_entropy_fwd, V {model.vocab_size}, WRITE_GRADIENT": Work(
            2 * logits, rows=1, swept=logits, n_rows=chunk_rows(model.vocab_size)
        ),
    }
