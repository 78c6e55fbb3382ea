"""Times every operator, phase, shape, dtype and provider: `pytest benchmarks --benchmark-only`.

pytest-benchmark's own table shows host-inclusive times. Our table below it shows device times.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.ceilings import copy_ceilings, matmul_ceiling
from benchmarks.conditions import default_device
from benchmarks.operators.measure import RECIPES, Cell, Floors, cells, measure
from benchmarks.results import KernelTime, Spread
from benchmarks.timing import Call, make_timer, synchronize

CELLS = list(cells(RECIPES, (torch.bfloat16, torch.float32)))


@pytest.fixture(scope="session")
def floors() -> Floors:
    """Ceilings of this device, measured in this run."""
    device = default_device()
    timer = make_timer(device)
    with timer.on_stream():
        dtypes = (torch.bfloat16, torch.float32)
        matmuls = [matmul_ceiling(timer, device, dtype) for dtype in dtypes]
        return Floors.of([*copy_ceilings(timer, device), *matmuls])


@pytest.mark.parametrize("cell", CELLS, ids=str)
# PyTorch's compiler imports deprecated modules.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kernel(cell: Cell, benchmark: Any, floors: Floors, rows: list[KernelTime]) -> None:
    device = default_device()
    benchmark.group = str(cell).removesuffix(f"-{cell.provider.name}".replace(" ", "-"))

    def time_host(calls: Sequence[Call]) -> Spread:
        def call_and_wait() -> None:
            calls[0]()
            synchronize(device)

        benchmark.pedantic(call_and_wait, rounds=10, warmup_rounds=1)
        return Spread.of(benchmark.stats.stats.data)

    try:
        row = measure(cell, device, floors, time_host)
    except ImportError as error:
        pytest.skip(f"{cell.provider.name} needs pip install {cell.provider.package}: {error}")
    rows.append(row)
    assert not row.failure or row.provider != "fastllama", row.failure
