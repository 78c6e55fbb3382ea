"""Every operator, phase, shape, type and provider: `pytest benchmarks --benchmark-only`.

The time in pytest-benchmark's own table includes the host; ours below it has that of the device.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.ceilings import copy_ceiling, matmul_ceiling
from benchmarks.conditions import default_device
from benchmarks.operators.measure import RECIPES, Cell, Floors, cells, measure
from benchmarks.results import KernelTime, Spread
from benchmarks.timing import Call, make_timer, synchronize

CELLS = list(cells(RECIPES, (torch.bfloat16, torch.float32)))


@pytest.fixture(scope="session")
def floors() -> Floors:
    """Of this device, now."""
    device = default_device()
    timer = make_timer(device)
    with timer.on_stream():
        dtypes = (torch.bfloat16, torch.float32)
        products = [matmul_ceiling(timer, device, dtype) for dtype in dtypes]
        return Floors.of([copy_ceiling(timer, device), *products])


@pytest.mark.parametrize("cell", CELLS, ids=str)
# PyTorch's compiler imports what PyTorch deprecates.
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
        pytest.skip(f"pip install {cell.provider.package} brings {cell.provider.name}: {error}")
    rows.append(row)
    assert not row.failure or row.provider != "fastllama", row.failure
