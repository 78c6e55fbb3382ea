"""Training on a CPU by one process and by several, which share the same cores and the same batch.

    python benchmarks/cpu_processes.py [--processes 2] [--rounds 7] [--updates 22]
        [--output FILE.json]

Trains the quickstart. One process computes with a thread per core. Each of several computes with
one thread, as torchrun sets it, on its part of the micro-batch; they communicate by gloo. Runs take
turns. Prints medians and extremes, and several over one in the same round.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

from benchmarks.conditions import current_conditions
from benchmarks.cpu_throughput import RECIPE, ROOT, trainer
from fastllama.config import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="a divisor of the batch of 8")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each")
    parser.add_argument("--updates", type=int, default=22, help="updates per run, 2 of warm-up")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    config = load_recipe(RECIPE)
    rates: dict[int, list[float]] = {1: [], options.processes: []}
    for number in range(options.rounds):
        for n_processes, values in rates.items():
            data = ROOT / config.data.path
            values.append(trainer(config, data, options.updates, n_processes=n_processes))
        latest = ", ".join(f"{n}: {values[-1]:,.0f}" for n, values in rates.items())
        print(f"round {number + 1}, processes: {latest} tok/s", flush=True)
    for n_processes, values in rates.items():
        ratios = [rate / one for rate, one in zip(values, rates[1], strict=True)]
        print(
            f"{n_processes} processes {statistics.median(values):,.0f} tok/s ({min(values):,.0f} "
            f"to {max(values):,.0f}), ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f})"
        )
    if options.output:
        content = {"conditions": asdict(current_conditions()), "tok_per_s_by_processes": rates}
        options.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
