"""Measures cells: one operator, shape, type, phase and provider each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.conditions import default_device, has_gpu
from benchmarks.operators import (
    attention,
    cross_entropy,
    linear_cross_entropy,
    rms_norm,
    rope,
    swiglu,
)
from benchmarks.operators.case import Benchmark, Operator, Provider, Shape
from benchmarks.results import Ceiling, KernelTime, Spread
from benchmarks.timing import Call, device_seconds, host_seconds, make_timer, peak_bytes
from fastllama.config import ModelConfig, load_recipe

BENCHMARKS: tuple[Benchmark, ...] = (
    *rms_norm.BENCHMARKS,
    *rope.BENCHMARKS,
    *attention.BENCHMARKS,
    *swiglu.BENCHMARKS,
    *cross_entropy.BENCHMARKS,
    *linear_cross_entropy.BENCHMARKS,
)

# On a CPU the kernels run in Triton's interpreter, and a rehearsal needs no size.
N_TOKENS, ERROR_TOKENS = (16_384, 2_048) if has_gpu() else (8, 4)
N_INPUTS = 2
"""Sets of inputs that calls take in turn."""

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = ("llama-1b", "llama-100m", "llama-3.2-1b", "llama-3.1-8b", "quickstart")


@dataclass(frozen=True)
class Cell:
    """What one row of the table is about."""

    benchmark: Benchmark
    recipe: str
    model: ModelConfig
    dtype: torch.dtype
    provider: Provider
    phase: str

    @property
    def shape(self) -> Shape:
        return self.benchmark.shape(self.model, N_TOKENS)

    @property
    def can_be_measured(self) -> bool:
        return self.phase in self.provider.phases and self.dtype in self.provider.dtypes

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = (self.benchmark.operator, self.recipe, dtype, self.phase, self.provider.name)
        return "-".join(parts).replace(" ", "-")


@dataclass(frozen=True)
class Floors:
    """Rates measured in this run, that floors are computed from."""

    bandwidth: float
    """Bytes read and written a second by a copy."""
    matmul: dict[str, float]
    """FLOP/s of a large product by type."""

    @classmethod
    def of(cls, ceilings: Sequence[Ceiling]) -> "Floors":
        """Of ceilings measured in one run."""
        rates = {(ceiling.name, ceiling.dtype): ceiling.rate.median for ceiling in ceilings}
        return cls(
            bandwidth=rates["copy", "uint8"],
            matmul={dtype: rates["matmul", dtype] for dtype in ("bfloat16", "float32")},
        )


def cells(recipes: Sequence[str], dtypes: Sequence[torch.dtype]) -> Iterator[Cell]:
    """Every cell of the recipes in configs; a shape that two of them share comes once.

    On a CPU those of a rehearsal: one small shape in float32, and one compilation.
    """
    device = default_device()
    if not has_gpu():
        recipes, dtypes = ["quickstart"], [torch.float32]
    for benchmark in BENCHMARKS:
        seen: set[tuple[int, ...]] = set()
        for recipe in recipes:
            model = load_recipe(CONFIGS / f"{recipe}.toml").model
            if not has_gpu():
                model = replace(model, vocab_size=256)
            shape = benchmark.shape(model, N_TOKENS)
            if (key := tuple(shape.values())) in seen:
                continue
            seen.add(key)
            for dtype in dtypes:
                for phase in benchmark.work(shape, dtype.itemsize):
                    for provider in benchmark.providers(shape, dtype, device):
                        cell = Cell(benchmark, recipe, model, dtype, provider, phase)
                        if cell.can_be_measured and (has_gpu() or _is_rehearsed(cell)):
                            yield cell


def _is_rehearsed(cell: Cell) -> bool:
    """One compilation shows the way as well as twenty do."""
    one = (cell.benchmark.operator, cell.phase) == ("swiglu", "both")
    return cell.provider.name != "compiled" or one


def measure(
    cell: Cell,
    device: torch.device,
    floors: Floors,
    time_host: Callable[[Sequence[Call]], Spread] | None = None,
) -> KernelTime:
    """Measure one cell; what the provider raises becomes the row's `failure`.

    Args:
        cell: what is measured.
        device: where.
        floors: rates that its floor is computed from.
        time_host: measures the host-inclusive time of one of several equal calls.

    Raises:
        ImportError: the provider is not installed.
    """
    operator = cell.provider.make()
    timer = make_timer(device, waits_for_host=cell.provider.waits_for_host)
    device_s, host_s, peak, error, failure = None, None, None, None, ""
    try:
        # Where one backend after the other is made, the last one made is the one that runs.
        error = largest_error(cell, operator, device)
        with timer.on_stream():
            calls = [phase_call(cell, operator, device, seed) for seed in range(N_INPUTS)]
            device_s = device_seconds(timer, calls)
            host_s = time_host(calls) if time_host else host_seconds(calls, device)
            peak = peak_bytes(calls[0], device)
    except Exception as raised:  # Of a library that is not ours: it is reported.
        failure = f"{type(raised).__name__}: {raised}".splitlines()[0]
        device_s, host_s = None, None
    work = cell.benchmark.work(cell.shape, cell.dtype.itemsize)[cell.phase]
    dtype = str(cell.dtype).removeprefix("torch.")
    return KernelTime(
        operator=cell.benchmark.operator,
        phase=cell.phase,
        recipe=cell.recipe,
        shape=cell.shape,
        dtype=dtype,
        provider=cell.provider.name,
        timer=timer.kind,
        device_s=device_s,
        host_s=host_s,
        peak_bytes=peak,
        error=error,
        bytes=work.bytes,
        flops=work.flops,
        floor_s=work.bytes / floors.bandwidth + work.flops / floors.matmul[dtype],
        failure=failure,
    )


def phase_call(cell: Cell, operator: Operator, device: torch.device, seed: int) -> Call:
    """One phase of `operator` on random inputs of its own."""
    inputs = _inputs(cell, cell.shape, cell.dtype, device, seed)
    leaves = _leaves(inputs)
    if cell.phase == "forward":
        return lambda: operator(*inputs)
    upstream = _upstream(operator(*inputs), seed)
    if cell.phase == "both":
        return lambda: _backward(operator(*inputs), leaves, upstream)
    outputs = operator(*inputs)
    return lambda: _backward(outputs, leaves, upstream, retain_graph=True)


def largest_error(cell: Cell, operator: Operator, device: torch.device) -> float:
    """Of the results of a phase, against the definition in float64, over the largest value.

    At fewer tokens than are timed: in float64 the scores of attention would fill the device.
    """
    shape = cell.benchmark.shape(cell.model, ERROR_TOKENS)
    truths = _truths(cell.benchmark, tuple(shape.items()), cell.dtype, device)
    inputs = _inputs(cell, shape, cell.dtype, device, seed=0)
    outputs, gradients = _results(operator, inputs)
    wanted_outputs, wanted_gradients = truths
    found = {"forward": outputs, "backward": gradients, "both": outputs + gradients}
    wanted = {
        "forward": wanted_outputs,
        "backward": wanted_gradients,
        "both": wanted_outputs + wanted_gradients,
    }
    # `max` of Python would pass over a NaN.
    errors = [
        ((x.double() - truth).abs().max() / truth.abs().max()).item()
        for x, truth in zip(found[cell.phase], wanted[cell.phase], strict=True)
    ]
    return torch.tensor(errors).max().item()


# One, because in float64 a few would fill a small device.
@lru_cache(maxsize=1)
def _truths(
    benchmark: Benchmark,
    shape: tuple[tuple[str, int], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the definition, in float64, of inputs rounded to `dtype`."""
    inputs = benchmark.inputs(dict(shape), dtype, torch.Generator(device).manual_seed(0))
    exact = tuple(
        x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in inputs
    )
    return _results(benchmark.reference, exact)


def _results(operator: Operator, inputs: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the leaves for the upstream gradients of seed 0."""
    outputs = operator(*inputs)
    kept = [x.detach().clone() for x in _as_tuple(outputs)]
    return kept, list(_backward(outputs, _leaves(inputs), _upstream(outputs, seed=0)))


def _inputs(
    cell: Cell, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Any, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    return cell.benchmark.inputs(shape, dtype, generator)


def _leaves(inputs: tuple[Any, ...]) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def _upstream(outputs: Tensor | tuple[Tensor, ...], seed: int) -> list[Tensor]:
    """Random gradients of the outputs, the same numbers in every type; 1 for a loss."""
    upstream = []
    for x in _as_tuple(outputs):
        generator = torch.Generator(x.device).manual_seed(seed)
        random = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.bfloat16)
        upstream.append(random.to(x.dtype) if x.ndim else torch.ones_like(x))
    return upstream


def _backward(
    outputs: Tensor | tuple[Tensor, ...],
    leaves: Sequence[Tensor],
    upstream: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(_as_tuple(outputs), leaves, upstream, retain_graph=retain_graph)


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
