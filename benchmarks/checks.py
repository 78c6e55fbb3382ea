"""Checks that must pass on a GPU before its timings mean anything.

- Every operator and the whole model are as exact as plain PyTorch, both compared with float64, by
  the same rule as in the tests.
- An update of the trainer never waits for the device, compiles without graph breaks, and is not
  recompiled.
- It launches the kernels that were counted on the null device, without a GPU.
"""

import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.conditions import default_device, has_gpu
from benchmarks.operators.case import Operator
from benchmarks.operators.measure import BENCHMARKS, CONFIGS, ERROR_TOKENS
from benchmarks.rehearsal.budgets import read_budget
from benchmarks.rehearsal.case import Case
from benchmarks.rehearsal.checks import launches as differing_launches
from benchmarks.rehearsal.log import short_name
from benchmarks.results import Check
from benchmarks.step_profile import Launch, operator_class, profile_updates
from benchmarks.training.trainer import trainer_step
from benchmarks.training.workload import with_synthetic_data, workload
from fastllama.config import Config, ModelConfig, load_recipe
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE, TRITON, Operators
from tests.compare import assert_as_exact_as, assert_operator_as_exact_as

COUNTED_WITH = "2.14."
"""The PyTorch whose launches are counted: other versions fuse other operators."""
SMALL = ModelConfig(
    vocab_size=1000, n_embd=256, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=256
)


def operator_checks(recipes: Sequence[str], dtypes: Sequence[torch.dtype]) -> Iterator[Check]:
    """Check outputs and gradients of every operator at the widths of the recipes."""
    device = default_device()
    for benchmark in BENCHMARKS:
        for recipe in recipes:
            model = load_recipe(CONFIGS / f"{recipe}.toml").model
            if not has_gpu():
                model = dataclasses.replace(model, vocab_size=256)
            shape = benchmark.shape(model, ERROR_TOKENS)
            for dtype in dtypes:
                inputs = benchmark.inputs(shape, dtype, torch.Generator(device).manual_seed(0))
                leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
                # The reference runs twice: in float64 as the truth, and in dtype as plain PyTorch.
                (ours, *_) = benchmark.providers(shape, dtype, device)
                operator, reference = (
                    _bind(function, inputs) for function in (ours.make(), benchmark.reference)
                )
                name = f"{benchmark.operator} {recipe} {str(dtype).removeprefix('torch.')}"
                yield _run_check(
                    name,
                    lambda: assert_operator_as_exact_as(operator, reference, reference, leaves),  # noqa: B023
                )


def _bind(function: Operator, inputs: tuple[Any, ...]) -> Operator:
    """`function` with its non-differentiable arguments bound."""

    def operator(*leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = iter(leaves)
        arguments = [
            next(given) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs
        ]
        return function(*arguments)

    return operator


def model_check(dtype: torch.dtype) -> Check:
    """Check the loss and all gradients of a small model that uses the kernels."""
    device = default_device()
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(
        SMALL.vocab_size, (2, 2, SMALL.max_seq_len if has_gpu() else 4), generator=generator
    ).to(device)

    def loss_and_gradients(operators: Operators, dtype: torch.dtype) -> list[Tensor]:
        with torch.device(device):
            model = Llama(SMALL, operators)
        model.init_weights(seed=0)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(rounded).to(dtype)
        loss = model(tokens, targets)
        loss.backward()
        return [loss.detach(), *(x.grad for x in model.parameters() if x.grad is not None)]

    rounded = dtype
    runs = (
        loss_and_gradients(operators, kind)
        for operators, kind in ((TRITON, dtype), (REFERENCE, dtype), (REFERENCE, torch.float64))
    )

    def compare() -> None:
        for actual, plain, truth in zip(*runs, strict=True):
            assert_as_exact_as(actual, plain, truth.double())

    return _run_check(f"model {str(dtype).removeprefix('torch.')}", compare)


def step_checks(config: Config) -> Iterator[Check]:
    """Check that an update neither waits for the device nor breaks graphs nor recompiles."""
    with tempfile.TemporaryDirectory() as folder:
        config = workload(config, config.training.tokens_per_update)
        config = with_synthetic_data(config, Path(folder) / "data")
        counters.clear()
        with trainer_step(config) as (step, world):
            for _ in range(2):
                step()
            compiled = counters["stats"]["unique_graphs"]
            if world.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            yield _run_check("an update does not wait for the device", step)
            if world.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            again = counters["stats"]["unique_graphs"] - compiled
            breaks = sum(counters["graph_break"].values())
    # With compilation on, zero compiled graphs is a failure too.
    whole = breaks == 0 and (compiled > 0 or not config.training.compile)
    yield Check("no graph is broken", whole, f"{breaks} breaks in {compiled} graphs")
    yield Check("nothing is compiled again", again == 0, f"{again} graphs after the second update")


def launch_check(recipe: str) -> Check:
    """Compare the kernels of a compiled update with the budget of `recipe`; needs a GPU."""
    case = Case(recipe, 1, compiled=True)
    with tempfile.TemporaryDirectory() as folder:
        config = with_synthetic_data(case.config(), Path(folder) / "data")
        with trainer_step(config) as (step, world):
            step()
            found, _ = profile_updates(step, 1, world.device)
    differences = launch_differences(found, read_budget(recipe)[case.name])
    return Check(f"launches of {recipe}", not differences, "; ".join(differences))


def launch_differences(found: Sequence[Launch], budget: dict[str, int]) -> list[str]:
    """Where the kernels of a profile differ from a budget.

    Copies and matmuls are left out: the device has other names for copies, and cuBLAS chooses the
    kernels of a matmul.
    """
    other = r"matmul |D2D |H2D |memset |Memcpy|Memset"
    counted = Counter(
        short_name(launch.name)
        for launch in found
        if not re.match(other, launch.name) and operator_class(launch.name) != "matmul"
    )
    expected = {name: count for name, count in budget.items() if not re.match(other, name)}
    return list(differing_launches(counted, expected))


def _run_check(name: str, check: Callable[[], object]) -> Check:
    try:
        check()
    except Exception as error:  # Any error is the result of the check.
        return Check(name, False, f"{type(error).__name__}: {error}".splitlines()[0])
    return Check(name, True, "")
