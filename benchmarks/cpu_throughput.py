"""Training on a CPU at the quickstart's shape: tokens/s of fastllama and of what it replaces.

    python benchmarks/cpu_throughput.py [--rounds 5] [--updates 12] [--output FILE.json]

fastllama trains the recipe as it is. A plain PyTorch loop and Hugging Face's `LlamaForCausalLM`,
where transformers is installed, train the same shape in float32 and under bfloat16 autocast, eager
and compiled. Processes run one at a time and take turns, so that other load affects all of them.

Prints medians and extremes. Each ratio is fastllama over the peer of the same round. Exits with 1
if fastllama is slower than the fastest peer, by the medians of these ratios.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from benchmarks.conditions import current_conditions
from fastllama.config import load_recipe

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "quickstart.toml"
MODELS = ("plain", "hugging-face") if find_spec("transformers") else ("plain",)


def plain_loop(data: Path, sequences: int, updates: int, *options: str) -> float:
    """Median tokens/s of the plain loop with these options."""
    script = str(ROOT / "benchmarks" / "plain_loop.py")
    command = [sys.executable, script, str(data / "train-00000.npy"), str(sequences), str(updates)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return float(done.stdout)


def trainer(data: Path, updates: int, tokens_per_update: int, *options: str) -> float:
    """Median tokens/s of `fastllama train`, with every update logged and without side jobs."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
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
        command += [str(part) for setting in settings.items() for part in setting]
        subprocess.run([*command, *options], capture_output=True, check=True)
        with open(f"{folder}/run/metrics.csv", newline="") as file:
            rates = [float(row["tok_per_s"]) for row in csv.DictReader(file)]
    return statistics.median(rates[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    parser.add_argument("--updates", type=int, default=12, help="updates per run, 2 of warm-up")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    config = load_recipe(RECIPE)
    data, tokens = ROOT / config.data.path, config.training.tokens_per_update
    contenders = [
        (model, dtype, how)
        for model in MODELS
        for dtype in ("float32", "bfloat16")
        for how in ("eager", "compiled")
    ]
    rates: dict[str, list[float]] = {}
    for number in range(options.rounds):
        rate = trainer(data, options.updates, tokens)
        rates.setdefault("fastllama, the recipe", []).append(rate)
        for contender in contenders:
            rate = plain_loop(data, config.sequences_per_update, options.updates, *contender)
            rates.setdefault(", ".join(contender), []).append(rate)
        latest = ", ".join(f"{name}: {values[-1]:,.0f}" for name, values in rates.items())
        print(f"round {number + 1}: {latest} tok/s", flush=True)
    ours = next(iter(rates))
    medians = []
    for name, values in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(rates[ours], values, strict=True)]
        medians.append(statistics.median(ratios))
        print(
            f"{name:32} {statistics.median(values):7,.0f} tok/s "
            f"({min(values):,.0f} to {max(values):,.0f}), fastllama is {medians[-1]:.3f} times as "
            f"fast ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    if options.output:
        conditions = asdict(current_conditions())
        environment = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_PROC_BIND")}
        content = {"conditions": conditions, "environment": environment, "tok_per_s": rates}
        options.output.write_text(json.dumps(content, indent=2) + "\n")
    sys.exit(min(medians[1:]) < 1)


if __name__ == "__main__":
    main()
