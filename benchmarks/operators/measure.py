"""Measures cells. A cell is one operator, shape, dtype, phase and provider."""

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

# On a CPU the kernels run in Triton's interpreter, so a rehearsal uses toy sizes.
REHEARSED_TOKENS = 8
ERROR_TOKENS = 2_048 if has_gpu() else 4
N_INPUTS = 2
"""Sets of inputs; consecutive calls alternate between them."""

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = ("llama-1b", "llama-100m", "llama-3.2-1b", "llama-3.1-8b", "quickstart")


@dataclass(frozen=True)
class Cell:
    """Key of one row of the table."""

    benchmark: Benchmark
    recipe: str
    model: ModelConfig
    n_tokens: int
    dtype: torch.dtype
    provider: Provider
    phase: str

    @property
    def shape(self) -> Shape:
        return self.benchmark.shape(self.model, self.n_tokens)

    @property
    def can_be_measured(self) -> bool:
        return self.phase in self.provider.phases and self.dtype in self.provider.dtypes

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = (self.benchmark.operator, self.recipe, dtype, self.phase, self.provider.name)
        return "-".join(parts).replace(" ", "-")


@dataclass(frozen=True)
class Floors:
    """Rates behind the floors, measured in this run."""

    bandwidth: float
    """Bytes read plus bytes written per second by the fastest copy."""
    matmul: dict[str, float]
    """FLOP/s of a large matmul by dtype."""

    @classmethod
    def of(cls, ceilings: Sequence[Ceiling]) -> "Floors":
        """Floors from the ceilings of one run.

        Raises:
            ValueError: there is no copy among them.
        """
        copies = [one.rate.median for one in ceilings if one.name == "copy"]
        if not copies:
            raise ValueError("no ceilings are measured; run the part `ceilings` first")
        return cls(
            bandwidth=max(copies),
            matmul={one.dtype: one.rate.median for one in ceilings if one.name == "matmul"},
        )


def micro_batch(recipe: str) -> tuple[ModelConfig, int]:
    """The model of a recipe and the tokens of its micro-batch; both are small in a rehearsal."""
    config = load_recipe(CONFIGS / f"{recipe}.toml")
    if not has_gpu():
        return replace(config.model, vocab_size=256), REHEARSED_TOKENS
    return config.model, config.training.batch_size * config.model.max_seq_len


def cells(recipes: Sequence[str], dtypes: Sequence[torch.dtype]) -> Iterator[Cell]:
    """Cells of the recipes in configs. A shape shared by two recipes appears once.

    On a CPU: the cells of the rehearsal, with one small shape in float32 and one compiled operator.
    """
    device = default_device()
    if not has_gpu():
        recipes, dtypes = ["quickstart"], [torch.float32]
    for benchmark in BENCHMARKS:
        seen: set[tuple[int, ...]] = set()
        for recipe in recipes:
            model, n_tokens = micro_batch(recipe)
            shape = benchmark.shape(model, n_tokens)
            if (key := tuple(shape.values())) in seen:
                continue
            seen.add(key)
            for dtype in dtypes:
                for phase in benchmark.work(shape, dtype.itemsize):
                    for provider in benchmark.providers(shape, dtype, device):
                        cell = Cell(benchmark, recipe, model, n_tokens, dtype, provider, phase)
                        if cell.can_be_measured and (has_gpu() or _is_rehearsed(cell)):
                            yield cell


def _is_rehearsed(cell: Cell) -> bool:
    """A rehearsal compiles only one operator, to save time."""
    one = (cell.benchmark.operator, cell.phase) == ("swiglu", "both")
    return cell.provider.name != "compiled" or one


def measure(
    cell: Cell,
    device: torch.device,
    floors: Floors,
    time_host: Callable[[Sequence[Call]], Spread] | None = None,
) -> KernelTime:
    """Measure one cell. An exception of the provider becomes the row's `failure`.

    Args:
        cell: the cell to measure.
        device: the device to measure on.
        floors: rates for the floor.
        time_host: measures the host-inclusive time of a call, given equivalent calls; None means
            `host_seconds`.

    Raises:
        ImportError: the provider is not installed.
    """
    # Load just before measuring: attention backends set process-wide state, so the last one wins.
    operator = cell.provider.make()
    timer = make_timer(device, waits_for_host=cell.provider.waits_for_host)
    device_s, host_s, peak, error, failure = None, None, None, None, ""
    try:
        error = largest_error(cell, operator, device)
        with timer.on_stream():
            calls = [phase_call(cell, operator, device, seed) for seed in range(N_INPUTS)]
            device_s = device_seconds(timer, calls)
            host_s = time_host(calls) if time_host else host_seconds(calls, device)
            peak = peak_bytes(calls[0], device)
    except Exception as raised:  # Raised by a third-party library; reported in the row.
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
    """A call of one phase of `operator`, on random inputs drawn from `seed`."""
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
    """Largest error of a phase against the reference in float64, over the largest value.

    It uses fewer tokens than the timing: attention scores in float64 would fill the device.
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
    # Python's `max` can drop a NaN; torch's propagates it.
    errors = [
        ((x.double() - truth).abs().max() / truth.abs().max()).item()
        for x, truth in zip(found[cell.phase], wanted[cell.phase], strict=True)
    ]
    return torch.tensor(errors).max().item()


# Only one entry: several float64 results would fill a small device.
@lru_cache(maxsize=1)
def _truths(
    benchmark: Benchmark,
    shape: tuple[tuple[str, int], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the reference in float64, for inputs rounded to `dtype`."""
    inputs = benchmark.inputs(dict(shape), dtype, torch.Generator(device).manual_seed(0))
    exact = tuple(
        x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in inputs
    )
    return _results(benchmark.reference, exact)


def _results(operator: Operator, inputs: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of the leaves for upstream gradients drawn from seed 0."""
    outputs = operator(*inputs)
    copies = [x.detach().clone() for x in _as_tuple(outputs)]
    return copies, list(_backward(outputs, _leaves(inputs), _upstream(outputs, seed=0)))


def _inputs(
    cell: Cell, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Any, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    return cell.benchmark.inputs(shape, dtype, generator)


def _leaves(inputs: tuple[Any, ...]) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def _upstream(outputs: Tensor | tuple[Tensor, ...], seed: int) -> list[Tensor]:
    """Random upstream gradients, the same numbers in every dtype; 1 for a scalar loss."""
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
