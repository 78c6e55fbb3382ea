"""Compare the trainer's tokens/s with a plain PyTorch loop, at the quickstart shape.

    python benchmarks/compare_plain_loop.py [--rounds 5] [--updates 12]

Both train the same shape in float32 on this machine's CPU, one process at a time. They alternate,
so that other load on the machine affects both. Each round gives one ratio, fastllama over plain
loop. The command prints median and extremes, and exits with 1 if the median is below 0.95.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fastllama.config import load_recipe

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "quickstart.toml"
THRESHOLD = 0.95


def plain_loop(data: Path, sequences: int, updates: int) -> float:
    """Median tokens/s of the plain loop."""
    script = str(ROOT / "benchmarks" / "plain_loop.py")
    command = [sys.executable, script, str(data / "train-00000.npy"), str(sequences), str(updates)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def trainer(data: Path, updates: int, tokens_per_update: int) -> float:
    """Median tokens/s of `fastllama train`, with every update logged and without side jobs."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "--run-dir": f"{folder}/run",
            "--data.path": data,
            "--training.device": "cpu",
            "--training.training-tokens": updates * tokens_per_update,
            "--training.eval-interval": 0,
            "--optimizer.warmup-iterations": 0,
            "--checkpoint.interval-tokens": 0,
            "--logging.log-interval": 1,
            "--logging.sample-interval": 0,
            "--logging.tensorboard": "false",
        }
        command = [sys.executable, "-m", "fastllama", "train", str(RECIPE)]
        command += [str(part) for option in options.items() for part in option]
        subprocess.run(command, capture_output=True, check=True)
        with open(f"{folder}/run/metrics.csv", newline="") as file:
            rates = [float(row["tok_per_s"]) for row in csv.DictReader(file)]
    return statistics.median(rates[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs")
    parser.add_argument(
        "--updates", type=int, default=12, help="updates per run, of which 2 are warm-up"
    )
    options = parser.parse_args()
    config = load_recipe(RECIPE)
    data, tokens = ROOT / config.data.path, config.training.tokens_per_update
    ratios = []
    for number in range(options.rounds):
        plain = plain_loop(data, config.sequences_per_update, options.updates)
        ours = trainer(data, options.updates, tokens)
        ratios.append(ours / plain)
        print(
            f"round {number + 1}: fastllama {ours:,.0f} tok/s, plain loop {plain:,.0f} tok/s, "
            f"ratio {ratios[-1]:.3f}",
            flush=True,
        )
    median = statistics.median(ratios)
    print(f"ratio {median:.3f} (median of {len(ratios)}; {min(ratios):.3f} to {max(ratios):.3f})")
    sys.exit(median < THRESHOLD)


if __name__ == "__main__":
    main()
