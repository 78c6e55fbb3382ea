"""Where an update of the quickstart goes on a CPU, by class of operators, next to the limit.

    python benchmarks/cpu_profile.py [--updates 8] [--output FILE.json] [-- OPTIONS OF TRAIN]

Profiles updates of `fastllama train configs/quickstart.toml` with PyTorch's profiler, which also
sees the kernels that Inductor writes. Prints milliseconds per update by class, the rate of every
matmul by shape, and the limit: all FLOPs of an update at the rate of a large matmul.

The name of an operator determines its class: the first matching pattern counts. "framework" is what
is left of the wall time: Python, autograd, and calls between kernels. "waiting" is for the loader.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile

import fastllama.train as trainer
from benchmarks.conditions import current_conditions
from benchmarks.cpu_throughput import RECIPE, ROOT, matmul_rates
from fastllama.cli import main as fastllama
from fastllama.config import Config, load_recipe
from fastllama.planning.flops import flops_per_token

CLASSES = {
    "matmul": r"^aten::(mm|addmm)$",
    "loss": r"gather|nll_loss|log_softmax",
    "attention": r"^aten::bmm$|softmax|masked_fill|flash_attention",
    "optimizer": r"adam|linalg_vector_norm|foreach",
    "copies": r"^aten::(copy_|fill_|zero_|cat|_to_copy|add_|embedding_dense_backward)$",
    "elementwise": r"cpp_fused|^aten::",
}
WARM_UP = 5
"""Updates before the profile: the first ones compile and allocate."""


@dataclass
class Profile:
    """Profiles the updates WARM_UP + 1 to WARM_UP + n of a training in this process."""

    n_updates: int
    profiler: Any = field(
        default_factory=lambda: profile(
            activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True
        )
    )
    step: int = 0
    config: Config | None = None
    """The options of the run."""
    wall_s: list[float] = field(default_factory=list)
    waiting_s: float = 0.0

    def train_step(self, session: Any, state: Any, loader: Any, stop: Any) -> Tensor:
        """Do one update, in place of `fastllama.train.train_step`."""
        self.step += 1
        self.config = session.config
        inside = WARM_UP < self.step <= WARM_UP + self.n_updates
        if self.step == WARM_UP + 1:
            self.profiler.start()
        waited, began = loader.wait_seconds, time.perf_counter()
        values = train_step(session, state, loader, stop)
        if inside:
            self.wall_s.append(time.perf_counter() - began)
            self.waiting_s += loader.wait_seconds - waited
        if self.step == WARM_UP + self.n_updates:
            self.profiler.stop()
        return values


train_step = trainer.train_step


def operator_class(name: str) -> str | None:
    """The class of an operator or kernel; None for a range around others."""
    for label, pattern in CLASSES.items():
        if re.search(pattern, name):
            return label
    return None


def run(updates: int, options: list[str]) -> Profile:
    """Train, and profile `updates` updates."""
    found = Profile(updates)
    trainer.train_step = found.train_step
    recipe = load_recipe(RECIPE)
    tokens = (WARM_UP + updates) * recipe.training.tokens_per_update
    # Otherwise the profiler sees one range for all kernels of a graph.
    kernels = {"cpp.enable_kernel_profile": True, "cpp.descriptive_names": "original_aten"}
    with tempfile.TemporaryDirectory() as folder, inductor.patch(kernels):
        settings = {
            "--run-dir": f"{folder}/run",
            "--data.path": ROOT / recipe.data.path,
            "--training.device": "cpu",
            "--training.training-tokens": tokens,
            "--training.eval-interval": 0,
            "--optimizer.warmup-iterations": 0,
            "--checkpoint.interval-tokens": 0,
            "--logging.sample-interval": 0,
            "--logging.tensorboard": "false",
        }
        arguments = [str(part) for setting in settings.items() for part in setting]
        fastllama(["train", str(RECIPE), *arguments, *options])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=8, help="updates of the profile")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("options", nargs="*", help="options of fastllama train, after --")
    options = parser.parse_args()
    found = run(options.updates, options.options)
    seconds: dict[str, float] = defaultdict(float)
    for event in found.profiler.key_averages():
        if label := operator_class(event.key):
            seconds[label] += event.self_cpu_time_total / 1e6 / options.updates
    wall = statistics.mean(found.wall_s)
    seconds["waiting"] = found.waiting_s / options.updates
    seconds["framework"] = wall - sum(seconds.values())
    assert found.config is not None
    tokens = found.config.training.tokens_per_update
    flops = tokens * flops_per_token(found.config.model, causal=True)
    rates = {dtype: max(matmul_rates(dtype)) for dtype in ("float32", "bfloat16")}
    print(f"{1000 * wall:.1f} ms an update, with the profiler on, {tokens / wall:,.0f} tok/s")
    for label, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{label:12} {1000 * value:7.1f} ms  {value / wall:4.0%}")
    for dtype, rate in rates.items():
        print(f"limit in {dtype}: {1000 * flops / rate:.1f} ms at {rate / 1e9:.0f} GFLOP/s")
    matmuls = []
    for event in found.profiler.key_averages(group_by_input_shape=True):
        if event.flops and event.key in ("aten::mm", "aten::addmm", "aten::bmm"):
            shapes = " x ".join(str(tuple(x)) for x in event.input_shapes[-3:] if len(x) > 1)
            rate = event.flops / (event.self_cpu_time_total / 1e6)
            matmuls.append(
                {"operator": event.key, "shapes": shapes, "calls": event.count, "flop_per_s": rate}
            )
    matmuls.sort(key=lambda matmul: matmul["flop_per_s"])
    for matmul in matmuls:
        calls = matmul["calls"] / options.updates
        print(
            f"{matmul['operator']:12} {matmul['shapes']:40} {calls:5.1f} calls an update "
            f"{matmul['flop_per_s'] / 1e9:6.0f} GFLOP/s"
        )
    if options.output:
        content = {
            "conditions": asdict(current_conditions()),
            "threads": torch.get_num_threads(),
            "wall_s": wall,
            "seconds": seconds,
            "limit_s": {dtype: flops / rate for dtype, rate in rates.items()},
            "matmuls": matmuls,
        }
        options.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
