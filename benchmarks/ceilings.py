"""Measure the ceilings of this device: copy, matmul and attention rates.

    python benchmarks/ceilings.py [RECIPE.toml …] [--out DIR]

- copy: a copy far larger than any cache, by the driver and by a kernel that reads and writes.
- matmul: a large square matmul of random numbers.
- gemm: every matmul of the recipes at its real shape, forward and both gradients.
- attention: causal attention at head_dim 64 and 128 and several lengths, with every available
  backend.

Kernel floors and the share of the bound H use these rates, measured in the same run, and not the
data sheet.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.conditions import current_conditions, default_device, has_gpu, results_name
from benchmarks.results import RESULTS, Ceiling, Spread, append
from benchmarks.timing import SECONDS, Call, Timer, device_seconds, make_timer
from fastllama.config import Config, ModelConfig, load_recipe
from fastllama.planning.bound import Rates
from fastllama_kernels.attention_backends import BACKENDS, AttentionShape, Backend
from fastllama_kernels.attention_choice import attention_operator

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = ("llama-1b", "llama-100m")

# A rehearsal uses toy sizes.
COPY_BYTES, WIDTH, ATTENTION_TOKENS = (2**32, 8192, 16384) if has_gpu() else (2**24, 256, 64)
REHEARSED_TOKENS = 64
SEQUENCE_LENGTHS = (1024, 2048, 4096, 8192) if has_gpu() else (32, 64)
HEAD_DIMS = (64, 128)


def copy_ceilings(timer: Timer, device: torch.device) -> Iterator[Ceiling]:
    """Bytes read plus bytes written per second.

    On an H100 the driver's copy is slower than a kernel of the same bytes.
    """
    source = torch.randn(COPY_BYTES // 8, device=device)
    target = torch.empty_like(source)
    ways = {"driver": lambda: target.copy_(source), "kernel": lambda: torch.neg(source, out=target)}
    for provider, copy in ways.items():
        rate = _rate(device_seconds(timer, [copy]), COPY_BYTES)
        yield Ceiling("copy", provider, {"bytes": COPY_BYTES}, "float32", rate)


def matmul_ceiling(timer: Timer, device: torch.device, dtype: torch.dtype) -> Ceiling:
    """FLOP/s of a large square matmul, measured long enough for the power limit to take effect."""
    return _gemm_ceiling(timer, device, dtype, "matmul", WIDTH, WIDTH, WIDTH, 10 * SECONDS)


def gemm_ceilings(
    timer: Timer, device: torch.device, model: ModelConfig, n_tokens: int
) -> Iterator[Ceiling]:
    """FLOP/s of every matmul of a micro-batch of `n_tokens`, in bfloat16."""
    width = model.n_embd
    projections = {
        "qkv": (width, (model.n_heads + 2 * model.kv_heads) * model.head_width),
        "attention output": (width, width),
        "gate_up": (width, 2 * model.ffn_width),
        "down": (model.ffn_width, width),
        "output": (width, model.vocab_size),
    }
    for name, (n_in, n_out) in projections.items():
        # y = x w^T, dx = dy w, dw = dy^T x.
        for phase, shape in (
            ("forward", (n_tokens, n_out, n_in)),
            ("input gradient", (n_tokens, n_in, n_out)),
            ("weight gradient", (n_out, n_in, n_tokens)),
        ):
            yield _gemm_ceiling(timer, device, torch.bfloat16, f"gemm {name} {phase}", *shape)


def _gemm_ceiling(
    timer: Timer,
    device: torch.device,
    dtype: torch.dtype,
    name: str,
    m: int,
    n: int,
    k: int,
    seconds: float = SECONDS,
) -> Ceiling:
    """FLOP/s of (m, k) @ (k, n), with the operand layouts of a linear layer's three matmuls."""

    def multiply() -> Call:
        left = torch.randn(m, k, device=device, dtype=dtype)
        right = torch.randn(k, n, device=device, dtype=dtype)
        if "weight gradient" in name:
            left = left.t().contiguous().t()
        elif "input gradient" not in name:
            right = right.t().contiguous().t()
        return lambda: torch.mm(left, right)

    rate = _rate(device_seconds(timer, [multiply(), multiply()], seconds), 2 * m * n * k)
    return Ceiling(name, "pytorch", {"M": m, "N": n, "K": k}, _name(dtype), rate)


def attention_ceilings(
    timer: Timer, device: torch.device, head_dim: int, seq_len: int
) -> Iterator[Ceiling]:
    """FLOP/s of causal attention with 2048 / head_dim heads, for every supported backend.

    The forward counts 2 T^2 K FLOPs per head (unmasked positions only), the backward 2.5 times as
    many.
    """
    n_heads = 2048 // head_dim
    shape = AttentionShape(
        batch_size=max(1, ATTENTION_TOKENS // seq_len),
        seq_len=seq_len,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        device=device,
    )
    for backend in BACKENDS:
        if backend.unsupported_reason(shape) is None:
            try:
                yield from _attention(timer, shape, backend)
            except Exception as error:  # Raised by a third-party library; measure the others.
                message = f"{type(error).__name__}: {error}".splitlines()[0]
                print(
                    f"attention {backend.name} failed, head_dim {head_dim}, T {seq_len}: {message}"
                )


def _attention(timer: Timer, shape: AttentionShape, backend: Backend) -> Iterator[Ceiling]:
    operator = attention_operator(backend.name)
    size = (shape.batch_size, shape.seq_len, shape.n_heads, shape.head_dim)
    q, k, v, upstream = (
        torch.randn(size, device=shape.device, dtype=shape.dtype) for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = operator(q, k, v)

    def forward() -> object:
        return operator(q, k, v)

    def backward() -> object:
        return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    sizes = dict(zip("BTHK", size, strict=True))
    flops = 2.0 * shape.batch_size * shape.n_heads * shape.seq_len**2 * shape.head_dim
    forward_s, backward_s = (device_seconds(timer, [call]) for call in (forward, backward))
    for name, rate in (
        ("attention forward", _rate(forward_s, flops)),
        ("attention backward", _rate(backward_s, 2.5 * flops)),
    ):
        yield Ceiling(name, backend.name, sizes, _name(shape.dtype), rate)


def measure_ceilings(configs: Sequence[Config]) -> Iterator[Ceiling]:
    """Measure all ceilings, the most important first; gemm ceilings for the micro-batches."""
    device = default_device()
    timer = make_timer(device)
    with timer.on_stream():
        yield from copy_ceilings(timer, device)
        yield matmul_ceiling(timer, device, torch.bfloat16)
        yield matmul_ceiling(timer, device, torch.float32)
        for head_dim in HEAD_DIMS:
            for seq_len in SEQUENCE_LENGTHS:
                yield from attention_ceilings(timer, device, head_dim, seq_len)
        for config in configs:
            n_tokens = config.training.batch_size * config.model.max_seq_len
            if not has_gpu():
                n_tokens = REHEARSED_TOKENS
            yield from gemm_ceilings(timer, device, config.model, n_tokens)


def measured_rates(ceilings: Sequence[Ceiling]) -> Rates | None:
    """Rates for the bound H from measured ceilings; None if one is missing."""
    best: dict[str, dict[tuple[int, int], float]] = defaultdict(lambda: defaultdict(float))
    for ceiling in ceilings:
        if ceiling.dtype == "bfloat16" or ceiling.name == "copy":
            key = (ceiling.shape.get("K", 0), ceiling.shape.get("T", 0))
            best[ceiling.name][key] = max(best[ceiling.name][key], ceiling.rate.median)
    forward, backward = best["attention forward"], best["attention backward"]
    if not (best["matmul"] and best["copy"] and forward and backward):
        return None
    attention: dict[int, dict[int, tuple[float, float]]] = defaultdict(dict)
    for head_dim, seq_len in sorted(forward):
        rates = (forward[head_dim, seq_len], backward[head_dim, seq_len])
        attention[head_dim][seq_len] = rates
    return Rates(
        matmul=max(best["matmul"].values()),
        bandwidth=max(best["copy"].values()),
        attention=dict(attention),
        source="measured in the same run",
    )


def _rate(seconds: Spread, count: float) -> Spread:
    return seconds.map(lambda second: count / second)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "recipes",
        nargs="*",
        type=Path,
        metavar="RECIPE.toml",
        default=[CONFIGS / f"{name}.toml" for name in RECIPES],
        help="recipes whose matmuls are measured; default: llama-1b and llama-100m",
    )
    conditions = current_conditions()
    out = RESULTS / results_name(conditions)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=out, help="results folder; default: %(default)s"
    )
    options = parser.parse_args()
    try:
        configs = [load_recipe(recipe) for recipe in options.recipes]
    except ValueError as error:
        parser.error(str(error))
    table = Table(title=conditions.device + ", rehearsal" * conditions.is_rehearsal)
    for heading in ("ceiling", "shape", "dtype", "provider", "10^12 / s", "interquartile range"):
        table.add_column(heading)
    for ceiling in measure_ceilings(configs):
        append(options.out, conditions, [ceiling])
        rate = ceiling.rate.map(lambda value: value / 1e12)
        table.add_row(
            ceiling.name,
            " ".join(f"{name} {size}" for name, size in ceiling.shape.items()),
            ceiling.dtype,
            ceiling.provider,
            f"{rate.median:.4g}",
            f"{rate.low:.4g} to {rate.high:.4g}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
