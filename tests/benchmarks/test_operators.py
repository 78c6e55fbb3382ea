"""Operator benchmarks: measured cells, minimal work, floors and errors."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.operators.case import Benchmark, Provider, ours
from benchmarks.operators.measure import (
    BENCHMARKS,
    REHEARSED_TOKENS,
    Cell,
    Floors,
    cells,
    largest_error,
    measure,
    phase_call,
)
from benchmarks.results import Ceiling, Spread
from fastllama.config import ModelConfig
from fastllama_kernels import REFERENCE

CPU = torch.device("cpu")
MODEL = ModelConfig(
    vocab_size=512, n_embd=64, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=32, max_seq_len=32
)
BY_NAME = {benchmark.operator: benchmark for benchmark in BENCHMARKS}
FLOORS = Floors(bandwidth=1e9, matmul={"float32": 1e12, "bfloat16": 2e12})


def nbytes(*tensors: Tensor) -> int:
    """Bytes of moving each tensor once. Vectors such as weights are negligible."""
    return sum(x.nbytes for x in tensors if x.ndim > 1)


def cell_of(
    benchmark: Benchmark, provider: Provider, phase: str, dtype: torch.dtype = torch.float32
) -> Cell:
    return Cell(benchmark, "tiny", MODEL, REHEARSED_TOKENS, dtype, provider, phase)


@pytest.mark.parametrize("operator", ["rms_norm", "add_rms_norm", "swiglu", "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_bytes_match_tensor_sizes(operator: str, dtype: torch.dtype) -> None:
    """Forward: read inputs, write outputs. Backward: gradients of both, plus the saved input."""
    benchmark = BY_NAME[operator]
    shape = benchmark.shape(MODEL, 256)
    inputs = benchmark.inputs(shape, dtype, torch.Generator(CPU).manual_seed(0))
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    outputs = benchmark.reference(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    work = benchmark.work(shape, dtype.itemsize)
    assert work["forward"].bytes == nbytes(*leaves, *outputs)
    # add_rms_norm saves only the sum of its inputs; both inputs share one gradient.
    saved, gradient = leaves[0], leaves[0]
    assert work["backward"].bytes == nbytes(*outputs, saved, gradient)


def test_rope_bytes() -> None:
    benchmark = BY_NAME["rope"]
    shape = benchmark.shape(MODEL, 256)
    q, k, v = benchmark.reference(*benchmark.inputs(shape, torch.float32, torch.Generator(CPU)))
    work = benchmark.work(shape, 4)
    assert work["forward"].bytes == 2 * nbytes(q, k)
    # The backward also packs the gradient of v. The forward leaves v in place.
    assert work["backward"].bytes == 2 * nbytes(q, k, v)


@pytest.mark.parametrize("operator", ["add_rms_norm_linear", "swiglu_linear"])
def test_flops_match_pytorch_counter(operator: str) -> None:
    benchmark = BY_NAME[operator]
    cell = cell_of(benchmark, ours(lambda: benchmark.reference), "forward")
    work = benchmark.work(cell.shape, 4)
    for phase in ("forward", "backward", "both"):
        call = phase_call(dataclasses.replace(cell, phase=phase), benchmark.reference, CPU, seed=0)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == work[phase].flops


def test_attention_flops_are_causal() -> None:
    shape = {"B": 2, "T": 32, "H": 4, "G": 2, "K": 16}
    work = BY_NAME["attention"].work(shape, 2)
    full = 2 * (2 * 2 * 4 * 32 * 32 * 16)
    assert work["forward"].flops == full / 2
    assert work["backward"].flops == 2.5 * full / 2


def test_linear_cross_entropy_flops() -> None:
    benchmark = BY_NAME["linear_cross_entropy"]
    cell = cell_of(benchmark, ours(lambda: benchmark.reference), "both")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        phase_call(cell, benchmark.reference, CPU, seed=0)()
    # phase_call runs one extra forward, to get the shape of the upstream gradient.
    assert counter.get_total_flops() - benchmark.work(cell.shape, 4)["both"].flops == (
        2 * cell.shape["N"] * cell.shape["V"] * cell.shape["D"]
    )


def test_largest_error() -> None:
    benchmark = BY_NAME["swiglu"]

    def slightly_wrong(gate_up: Tensor) -> Tensor:
        h = REFERENCE.swiglu(gate_up)
        return h + 0.01 * h.detach().abs().max()

    def wrong_backward(gate_up: Tensor) -> Tensor:
        return REFERENCE.swiglu(gate_up.detach()) + 0 * gate_up.sum()

    def unwritten(gate_up: Tensor) -> Tensor:
        return torch.full_like(REFERENCE.swiglu(gate_up), torch.nan) + 0 * gate_up.sum()

    def error(operator: Any, phase: str) -> float:
        return largest_error(cell_of(benchmark, ours(lambda: operator), phase), operator, CPU)

    assert error(REFERENCE.swiglu, "both") < 1e-6
    assert error(slightly_wrong, "forward") == pytest.approx(0.01, rel=1e-3)
    assert error(slightly_wrong, "backward") < 1e-6
    assert error(wrong_backward, "forward") < 1e-6
    assert error(wrong_backward, "both") == 1.0
    assert torch.tensor(error(unwritten, "forward")).isnan()


def test_floor_uses_rates_of_the_run() -> None:
    benchmark = BY_NAME["swiglu_linear"]
    provider = ours(lambda: benchmark.reference)
    row = measure(cell_of(benchmark, provider, "both"), CPU, FLOORS)
    assert row.floor_s == pytest.approx(row.bytes / 1e9 + row.flops / 1e12)
    assert row.failure == ""
    assert row.device_s is not None
    assert row.share_of_floor == row.floor_s / row.device_s.median


def test_provider_exception_becomes_failure() -> None:
    benchmark = BY_NAME["swiglu"]

    def fail(gate_up: Tensor) -> Tensor:
        raise RuntimeError("no such shape\nand more")

    row = measure(cell_of(benchmark, ours(lambda: fail), "forward"), CPU, FLOORS)
    assert (row.failure, row.device_s) == ("RuntimeError: no such shape", None)


def test_missing_provider_raises_import_error() -> None:
    def missing() -> Any:
        raise ImportError("no module")

    with pytest.raises(ImportError):
        measure(cell_of(BY_NAME["swiglu"], ours(missing), "forward"), CPU, FLOORS)


def test_cells_cover_every_operator_and_plain_pytorch() -> None:
    measured = list(cells(["quickstart"], [torch.float32]))
    operators = {field.name for field in dataclasses.fields(REFERENCE)} - {"name"}
    assert {cell.benchmark.operator for cell in measured} == operators
    for operator in operators - {"attention"}:
        providers = {cell.provider.name for cell in measured if cell.benchmark.operator == operator}
        assert {"fastllama", "eager"} <= providers
    assert len({str(cell) for cell in measured}) == len(measured)


def test_floors_from_ceilings() -> None:
    rate = Spread(5.0, 4.0, 6.0, 9)
    ceilings = [
        Ceiling("matmul", "pytorch", {}, "bfloat16", rate.map(lambda x: 2 * x)),
        Ceiling("gemm qkv", "pytorch", {}, "bfloat16", rate.map(lambda x: 3 * x)),
        Ceiling("matmul", "pytorch", {}, "float32", rate),
        Ceiling("copy", "kernel", {}, "float32", rate.map(lambda x: 4 * x)),
        Ceiling("copy", "driver", {}, "float32", rate.map(lambda x: 3 * x)),
    ]
    assert Floors.of(ceilings) == Floors(20.0, {"bfloat16": 10.0, "float32": 5.0})
