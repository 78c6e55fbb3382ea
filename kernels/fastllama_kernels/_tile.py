"""The part of a matrix that a program of an elementwise kernel works on."""

import triton
import triton.language as tl


@triton.jit
def row_and_columns(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return the row, int64, and the columns of a program of BLOCK columns.

    Neighbouring programs share a row: they run at the same time, and together they read and write
    long runs of memory.
    """
    N_BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    columns = program % N_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    return (program // N_BLOCKS).to(tl.int64), columns
