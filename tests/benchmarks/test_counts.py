"""The counts of compiled kernels, on machine code and numbers that the tests write down."""

import dataclasses

import pytest

from benchmarks.counts.budget import Count, Work, count, faults, issued_bytes, read_budget
from benchmarks.counts.compiled import CompiledKernel
from benchmarks.counts.launches import label
from benchmarks.counts.liger import count_liger
from benchmarks.counts.sass import Region, regions
from benchmarks.counts.table import rows
from benchmarks.counts.traffic import Moved

SASS = """
        .global         _kernel
_kernel:
.text._kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R45], desc[UR16][R22.64], !P3 ;
.L_x_0:
        /*0030*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64+0x10] ;
        /*0040*/                   LDG.E.ENL2.256 R8, R12, desc[UR4][R2.64] ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   STG.E.128 desc[UR4][R6.64], R4 ;
        /*0070*/              @!P4 BRA `(.L_x_1) ;
        /*0080*/                   STG.E desc[UR4][R6.64], R1 ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
.L_x_2:
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
        /*00c0*/                   NOP;
"""

NESTED = [
    Region(None, 5, loaded=0, stored=0),
    Region(0, 3, loaded=16, stored=16),
    Region(1, 3, loaded=48, stored=0),
]


def test_loops_of_machine_code_are_found() -> None:
    assert regions(SASS) == NESTED


def compiled(**changes: object) -> CompiledKernel:
    kernel = CompiledKernel(
        kernel="_kernel",
        architecture=90,
        constants={},
        pointers={"x_ptr": "bf16"},
        warps=2,
        registers=40,
        spill_store_bytes=0,
        spill_load_bytes=0,
        shared_bytes=0,
        warps_per_multiprocessor=48,
        wide_loads=3,
        wide_stores=1,
        async_copies=0,
        has_float64=False,
        has_atomics=False,
        regions=NESTED,
    )
    return dataclasses.replace(kernel, **changes)


# Ten rows a program, and a loop that runs four times to load 12 KiB with 64 threads.
WORK = Work(floor=2**14, rows=10, programs=132, swept=12 * 2**10, n_rows=1320)


def test_instructions_are_those_of_all_passes() -> None:
    found = count(compiled(), WORK)
    # Of both warps, in ten rows: 5 once, 3 in each row, 3 in each row and block.
    assert found.instructions == pytest.approx(2 * (5 + 10 * (3 + 4 * 3)) / 10 / 16)
    assert found.in_flight == 48 * 32 * 48 / 1024
    assert issued_bytes(compiled(), WORK) == 64 * (32 + 4 * 48)


def test_loop_that_moves_nothing_is_an_error() -> None:
    idle = [NESTED[0], Region(0, 3, loaded=0, stored=0)]
    with pytest.raises(ValueError, match="has a loop that moves nothing"):
        count(compiled(regions=idle), dataclasses.replace(WORK, programs=None))


def test_rows_that_leave_the_cache_are_read_from_memory() -> None:
    # An H100 has 50 MiB, and 132 programs a row each.
    fits, leaves = (Moved(0, 0, 2**14, again, 0) for again in (2**17, 2**18))
    assert count(compiled(), WORK, fits).moved == 1
    assert count(compiled(), WORK, fits).cached == pytest.approx(132 / 400)
    assert count(compiled(), WORK, leaves).moved == 1 + 2**18 / 2**14


def test_sums_of_programs_are_written_once_each() -> None:
    moved = count(compiled(), WORK, Moved(100, 1000, 2**14, 0, 0)).moved
    assert moved == pytest.approx(1 + (100 + 132 * 1000) / 1320 / 2**14)


GOOD = Count("kernel", 90, 1.0, 100.0, 40, 48, 0, 64.0, 0.0)
BUDGET = {"kernel": {"sm_90": {"moved": 1.0, "instructions": 99.0}}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"spilled": 16}, "kernel, sm_90 spills 16 bytes of a thread"),
        ({"cached": 0.6}, "kernel, sm_90 reads again rows that fill 60% of the L2 cache"),
        ({"moved": 1.019}, ""),
        ({"moved": 1.021}, "kernel, sm_90: moved is 1.021, and the limit 1.02"),
        ({"instructions": 100.9}, ""),
        ({"instructions": 101.0}, "kernel, sm_90: instructions grew from 99.0 to 101.000"),
        ({"instructions": 201.0}, "kernel, sm_90: instructions is 201.000, and the limit 200"),
        ({"label": "other"}, "other, sm_90 has no budget; store it with --update"),
    ],
)
def test_each_limit_is_checked(changes: dict[str, object], sentence: str) -> None:
    found = list(faults(dataclasses.replace(GOOD, **changes), BUDGET))
    assert sentence in found if sentence else not found


def test_labels_say_what_matters() -> None:
    constants = {"D": 2048, "BLOCK": 2048, "eps": 1e-5, "HAS_DSTREAM": True, "RECOMPUTE": False}
    assert label("_rms_norm_bwd_kernel", constants, {}) == "rms_norm_bwd, D 2048, HAS_DSTREAM"
    assert label("_rope_kernel", {"R": 32}, {"positions_ptr": "i64"}) == "rope, R 32, positions"
    pointers = {"x_ptr": "fp32", "out_ptr": "bf16"}
    assert label("_scaled_kernel", {"ADDS": True}, pointers) == "scaled, fp32 to bf16, ADDS"


def test_liger_is_counted_in_the_same_way() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    found = {one.label: one for one in count_liger()}
    assert len(found) == 30
    assert all(20 < one.instructions < 1000 and not one.spilled for one in found.values())
    # They sum what ours sums, in a loop that is alike.
    ours = read_budget()["rms_norm_bwd, D 2048"]["sm_90"]["instructions"]
    assert found["rms_norm_bwd, D 2048"].instructions == pytest.approx(ours, rel=0.3)


def test_table_shows_the_most_of_all_architectures() -> None:
    others = [
        dataclasses.replace(GOOD, architecture=architecture, instructions=instructions)
        for architecture, instructions in ((80, 90.0), (100, 120.0))
    ]
    assert rows([GOOD, *others]) == [("kernel", "1.000", "100 (120)", "40", "48", "64", "")]
