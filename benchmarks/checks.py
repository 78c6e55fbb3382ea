"""What has to hold on a GPU before any of its times mean anything.

Every operator, and then the model, as exact as plain PyTorch against float64, by the rule of the
tests; an update of the trainer that never waits for the device, is compiled without a break in a
graph, and is not compiled again.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.conditions import default_device, has_gpu
from benchmarks.operators.case import Operator
from benchmarks.operators.measure import BENCHMARKS, CONFIGS, ERROR_TOKENS
from benchmarks.results import Check
from benchmarks.training.trainer import trainer_step
from benchmarks.training.workload import with_synthetic_data, workload
from fastllama.config import Config, ModelConfig, load_recipe
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE, TRITON, Operators
from tests.compare import assert_as_exact_as, assert_operator_as_exact_as

SMALL = ModelConfig(
    vocab_size=1000, n_embd=256, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=256
)


def operator_checks(recipes: Sequence[str], dtypes: Sequence[torch.dtype]) -> Iterator[Check]:
    """Outputs and gradients of every operator at the widths of the recipes."""
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
                # The reference in float64, and in the type as what plain PyTorch can do.
                (ours, *_) = benchmark.providers(shape, dtype, device)
                operator, reference = (
                    _of_leaves(function, inputs) for function in (ours.make(), benchmark.reference)
                )
                name = f"{benchmark.operator} {recipe} {str(dtype).removeprefix('torch.')}"
                yield _checked(
                    name,
                    lambda: assert_operator_as_exact_as(operator, reference, reference, leaves),  # noqa: B023
                )


def _of_leaves(function: Operator, inputs: tuple[Any, ...]) -> Operator:
    """The operator as a function of its differentiable inputs."""

    def operator(*leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = iter(leaves)
        arguments = [
            next(given) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs
        ]
        return function(*arguments)

    return operator


def model_check(dtype: torch.dtype) -> Check:
    """Loss and every gradient of a small model on the kernels."""
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

    return _checked(f"model {str(dtype).removeprefix('torch.')}", compare)


def step_checks(config: Config) -> Iterator[Check]:
    """That an update neither waits for the device nor is compiled twice."""
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
            yield _checked("an update does not wait for the device", step)
            if world.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            again = counters["stats"]["unique_graphs"] - compiled
            breaks = sum(counters["graph_break"].values())
    # No graph at all is not a whole one.
    whole = breaks == 0 and (compiled > 0 or not config.training.compile)
    yield Check("no graph is broken", whole, f"{breaks} breaks in {compiled} graphs")
    yield Check("nothing is compiled again", again == 0, f"{again} graphs after the second update")


def _checked(name: str, check: Callable[[], object]) -> Check:
    try:
        check()
    except Exception as error:  # Whatever is wrong is what has to be reported.
        return Check(name, False, f"{type(error).__name__}: {error}".splitlines()[0])
    return Check(name, True, "")
