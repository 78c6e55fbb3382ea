"""Training on a CPU: tokens/s of fastllama and of what it replaces.

    python benchmarks/cpu_throughput.py [--shape quickstart|30m|97m] [--rounds 5] [--updates 12]
        [--fastest] [--output FILE.json]

fastllama trains the quickstart as it is, or with the layers, widths and context of the shape. A
plain PyTorch loop and Hugging Face's `LlamaForCausalLM`, where transformers is installed, train the
same shape in float32 and under bfloat16 autocast, eager and compiled. Processes run one at a time
and take turns, so that other load affects all of them.

Prints medians and extremes, and the share of two limits: all FLOPs of an update at the rate of a
large matmul, the fastest and the median of 40 in each round. The fastest is what the cores can do.
The median compares with a run's rate, which is the median of its updates. Each ratio is fastllama
over the peer of the same round. Exits with 1 if fastllama is slower than the fastest peer, by the
medians of these ratios.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.conditions import current_conditions
from fastllama.config import Config, load_recipe
from fastllama.planning.flops import flops_per_token

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "quickstart.toml"
MODELS = ("plain", "hugging-face") if find_spec("transformers") else ("plain",)


SHAPES: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "30m": {"n_embd": 512, "n_layers": 7, "n_heads": 8, "max_seq_len": 512},
    "97m": {"n_embd": 768, "n_layers": 12, "n_heads": 12, "max_seq_len": 1024},
}
"""What differs from the quickstart's model."""
MATMUL = """
import sys, time, torch
x = torch.ones(2048, 2048, dtype=getattr(torch, sys.argv[1]))
times = []
for _ in range(20):
    start = time.perf_counter()
    x @ x
    times.append(time.perf_counter() - start)
print(*(2 * 2048**3 / seconds for seconds in times))
"""


def matmul_rates(dtype: str) -> list[float]:
    """FLOP/s of 20 matmuls of 2,048 x 2,048 matrices."""
    command = [sys.executable, "-c", MATMUL, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(rate) for rate in done.stdout.split()]


def plain_shape(config: Config) -> dict[str, int]:
    """The shape of a recipe as plain_loop.py takes it."""
    model = config.model
    return {
        "width": model.n_embd,
        "layers": model.n_layers,
        "heads": model.n_heads,
        "ffn": model.ffn_width,
        "vocabulary": model.vocab_size,
        "sequence": model.max_seq_len,
        "batch": config.sequences_per_update,
    }


def plain_loop(config: Config, data: Path, updates: int, *options: str) -> float:
    """Median tokens/s of the plain loop with these options."""
    script = str(ROOT / "benchmarks" / "plain_loop.py")
    command = [
        sys.executable,
        script,
        str(data / "train-00000.npy"),
        json.dumps(plain_shape(config)),
    ]
    command.append(str(updates))
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return float(done.stdout)


def trainer(config: Config, data: Path, updates: int, *options: str, n_processes: int = 1) -> float:
    """Median tokens/s of `fastllama train`, with every update logged and without side jobs."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "--run-dir": f"{folder}/run",
            "--data.path": data,
            "--training.device": "cpu",
            "--training.tokens-per-update": config.training.tokens_per_update,
            "--training.training-tokens": updates * config.training.tokens_per_update,
            "--training.batch-size": config.training.batch_size // n_processes,
            "--model.n-embd": config.model.n_embd,
            "--model.n-layers": config.model.n_layers,
            "--model.n-heads": config.model.n_heads,
            "--model.max-seq-len": config.model.max_seq_len,
            "--training.eval-interval": 0,
            "--optimizer.warmup-iterations": 0,
            "--checkpoint.interval-tokens": 0,
            "--logging.log-interval": 1,
            "--logging.sample-interval": 0,
            "--logging.tensorboard": "false",
        }
        command = [sys.executable]
        if n_processes > 1:
            launcher = "torch.distributed.run", "--standalone", "--nproc-per-node"
            command += ["-m", *launcher, str(n_processes)]
        command += ["-m", "fastllama", "train", str(RECIPE)]
        command += [str(part) for setting in settings.items() for part in setting]
        subprocess.run([*command, *options], capture_output=True, check=True)
        with open(f"{folder}/run/metrics.csv", newline="") as file:
            rates = [float(row["tok_per_s"]) for row in csv.DictReader(file)]
    return statistics.median(rates[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="quickstart", help="what is trained")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    parser.add_argument("--updates", type=int, default=12, help="updates per run, 2 of warm-up")
    parser.add_argument("--fastest", action="store_true", help="bfloat16, compiled peers only")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    recipe = load_recipe(RECIPE)
    data = ROOT / recipe.data.path
    model = dataclasses.replace(recipe.model, **SHAPES[options.shape])
    tokens = recipe.training.batch_size * model.max_seq_len
    training = dataclasses.replace(recipe.training, tokens_per_update=tokens)
    config = dataclasses.replace(recipe, model=model, training=training)
    dtypes, ways = (
        (["bfloat16"], ["compiled"])
        if options.fastest
        else (["float32", "bfloat16"], ["eager", "compiled"])
    )
    peers = list(itertools.product(MODELS, dtypes, ways))
    rates: dict[str, list[float]] = {}
    limits: dict[str, dict[str, list[float]]] = {"fastest": {}, "median": {}}
    for number in range(options.rounds):
        matmuls = {dtype: matmul_rates(dtype) for dtype in ("float32", "bfloat16")}
        rate = trainer(config, data, options.updates)
        rates.setdefault("fastllama", []).append(rate)
        if "float32" in dtypes:
            rate = trainer(config, data, options.updates, "--training.dtype", "float32")
            rates.setdefault("fastllama, float32", []).append(rate)
        for dtype, found in matmuls.items():
            found += matmul_rates(dtype)
            for name, choose in (("fastest", max), ("median", statistics.median)):
                rate = choose(found) / flops_per_token(model, causal=True)
                limits[name].setdefault(dtype, []).append(rate)
        for peer in peers:
            rate = plain_loop(config, data, options.updates, *peer)
            rates.setdefault(", ".join(peer), []).append(rate)
        latest = ", ".join(f"{name}: {values[-1]:,.0f}" for name, values in rates.items())
        print(f"round {number + 1}: {latest} tok/s", flush=True)
    for name, of_dtypes in limits.items():
        for dtype, values in of_dtypes.items():
            limit = statistics.median(values)
            print(f"limit by the {name} matmul in {dtype}: {limit:,.0f} tok/s")
    ours = next(iter(rates))
    medians = []
    for name, values in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(rates[ours], values, strict=True)]
        if not name.startswith("fastllama"):
            medians.append(statistics.median(ratios))
        dtype = "float32" if "float32" in name else "bfloat16"
        share, of_median = (
            statistics.median(rate / most for rate, most in zip(values, limit[dtype], strict=True))
            for limit in limits.values()
        )
        print(
            f"{name:32} {statistics.median(values):7,.0f} tok/s "
            f"({min(values):,.0f} to {max(values):,.0f}), {share:.2f} and {of_median:.2f} of its "
            f"limits; fastllama is "
            f"{statistics.median(ratios):.3f} times as fast ({min(ratios):.3f} to "
            f"{max(ratios):.3f})"
        )
    if options.output:
        conditions = asdict(current_conditions())
        environment = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_PROC_BIND")}
        content = {
            "conditions": conditions,
            "environment": environment,
            "shape": options.shape,
            "limit_tok_per_s": limits,
            "tok_per_s": rates,
        }
        options.output.write_text(json.dumps(content, indent=2) + "\n")
    sys.exit(min(medians) < 1)


if __name__ == "__main__":
    main()
