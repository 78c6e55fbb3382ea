"""Counts what the compiled kernels of the recipes move and issue, without a GPU.

    python -m benchmarks.counts [--markdown] [--update] [--liger]

Compiles every launch for three GPUs, runs it in Triton's interpreter, and prints the counts. Exits
with 1 if a count is above its limit or grew over the stored budget. `--update` stores the counts.
`--liger` counts the kernels of liger-kernel instead, where it is installed.
"""

import argparse
import sys

from benchmarks.counts.budget import (
    SUM_OF_PROGRAMS,
    Count,
    count,
    faults,
    has_budget,
    read_budget,
    work_of,
    write_budget,
)
from benchmarks.counts.compiled import CompiledKernel, compile_recipes
from benchmarks.counts.liger import count_liger
from benchmarks.counts.table import print_markdown, print_table, rows
from benchmarks.counts.traffic import Moved, moved_by_recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--update", action="store_true", help="store the counts")
    parser.add_argument("--liger", action="store_true", help="count the kernels of liger-kernel")
    options = parser.parse_args()
    show = print_markdown if options.markdown else print_table
    if options.liger:
        show(rows(count_liger()))
        return
    counts = count_recipes(compile_recipes(), moved_by_recipes())
    if options.update:
        write_budget(counts)
    show(rows(counts))
    budget = read_budget()
    if not has_budget():
        print("The stored counts are of another version of Triton: only the limits are checked.")
        budget = {one.label: {} for one in counts}
    found = [sentence for one in counts for sentence in faults(one, budget)]
    for sentence in found:
        print(sentence, file=sys.stderr)
    sys.exit(1 if found else 0)


def count_recipes(kernels: list[CompiledKernel], moved: dict[str, Moved]) -> list[Count]:
    """Count the launches of the recipes; those with options that no recipe sets are left out."""
    return [
        count(
            kernel,
            work_of(kernel),
            None if kernel.kernel == SUM_OF_PROGRAMS else moved[kernel.label],
        )
        for kernel in kernels
        if kernel.label in moved
    ]


if __name__ == "__main__":
    main()
