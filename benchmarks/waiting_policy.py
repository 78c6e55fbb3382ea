"""Tokens/s of the quickstart in float32, by OpenMP waiting policy, on a quiet and a busy machine.

    python benchmarks/waiting_policy.py [--rounds 5] [--updates 12] [--output FILE.json]

Threads that have done their part of an operator wait for the others. They spin for a while, and
then sleep. fastllama lets them spin for a shorter time than OpenMP by itself, "passive" not at all.
On the busy machine another process keeps one core busy. Runs alternate, so that other load affects
all of them. Prints medians and extremes. Each ratio is to the run of the same round with OpenMP's
default on the quiet machine; the median of these ratios does not move when the machine does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

from benchmarks.conditions import current_conditions
from benchmarks.cpu_throughput import RECIPE, ROOT, trainer
from fastllama.cli import SPIN_COUNT
from fastllama.config import load_recipe

POLICIES = {
    "OpenMP": {"GOMP_SPINCOUNT": "300000"},
    "fastllama": {"GOMP_SPINCOUNT": SPIN_COUNT},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
"""Environment variables. The first is what GNU's OpenMP does without any."""
FLOAT32 = ("--training.dtype", "float32", "--training.compile", "false")


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy with another process."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind")
    parser.add_argument("--updates", type=int, default=10, help="updates per run, 2 of warm-up")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    config = load_recipe(RECIPE)
    data = ROOT / config.data.path
    rates: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for load in ("quiet", "busy"):
            for policy, variables in POLICIES.items():
                os.environ.update(variables)
                with busy_core() if load == "busy" else nullcontext():
                    rate = trainer(config, data, options.updates, *FLOAT32)
                for name in variables:
                    del os.environ[name]
                rates.setdefault(f"{load}, {policy}", []).append(rate)
                print(f"{load}, {policy}: {rate:,.0f} tok/s", flush=True)
    reference = next(iter(rates.values()))
    for name, values in rates.items():
        ratios = [rate / default for rate, default in zip(values, reference, strict=True)]
        print(
            f"{name:15} {statistics.median(values):7,.0f} tok/s "
            f"({min(values):,.0f} to {max(values):,.0f}), ratio {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )
    if options.output:
        content = {"conditions": asdict(current_conditions()), "tok_per_s": rates}
        options.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
