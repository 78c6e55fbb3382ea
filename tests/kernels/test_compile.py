"""torch.compile over the operators: one graph, the same numbers, nothing copied or widened.

On the CPU inductor writes C++ around the operators, which stay what Triton's interpreter runs.
"""

import dataclasses
import re
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.utils.checkpoint import checkpoint

from fastllama_kernels import REFERENCE, TRITON
from tests.compare import DEVICE, assert_as_exact_as, outputs_and_gradients
from tests.kernels.operator_cases import CASES, Case
from tests.kernels.small_model import MULTI_HEAD, loss_and_gradients, random_tokens, small_model

# PyTorch warns of its own code.
pytestmark = pytest.mark.filterwarnings("ignore")

# Three layers, the third of which is like the second.
CONFIG = dataclasses.replace(MULTI_HEAD, n_layers=3)

# As the trainer does it; and the loss and the embedding too, where inductor takes too long to try
# on the CPU.
RUNS = [("blocks", "inductor"), ("model", "aot_eager" if DEVICE == "cpu" else "inductor")]


@dataclass(frozen=True)
class Run:
    """Two updates' worth of a compiled model, the second of which may compile nothing."""

    gradients: list[dict[str, Tensor]]
    n_graphs: int
    sources: list[str]
    """What inductor wrote: forwards and backwards."""


def batch(number: int) -> Tensor:
    """Tokens and targets."""
    return random_tokens(CONFIG, 2, 1, 3, seed=number)


@cache
def eager_runs(number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Triton operators, and float64."""
    plain, exact = small_model(CONFIG, TRITON), small_model(CONFIG, REFERENCE, exact=True)
    return loss_and_gradients(plain, *batch(number)), loss_and_gradients(exact, *batch(number))


@cache
def compiled_run(part: str, backend: str) -> Run:
    model = small_model(CONFIG, TRITON)
    torch._dynamo.reset()
    counters.clear()
    for module in model.blocks if part == "blocks" else [model]:
        module.compile(fullgraph=True, dynamic=False, backend=backend)
    # A graph from the cache would come without its source.
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        _, sources = run_fw_bw_and_get_code(lambda: model(*batch(0)))
    model.zero_grad()
    n_graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [loss_and_gradients(model, *batch(number)) for number in (0, 1)]
    return Run(found, n_graphs, sources)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_is_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(case.run, fullgraph=True, dynamic=False, backend="aot_eager")
    pairs = [outputs_and_gradients(run, case.inputs()) for run in (compiled, case.run)]
    assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))


@pytest.mark.parametrize(("part", "backend"), RUNS)
def test_gradients_are_those_of_eager(part: str, backend: str) -> None:
    for number, found in enumerate(compiled_run(part, backend).gradients):
        plain, truth = eager_runs(number)
        assert found.keys() == plain.keys()
        for name, gradient in found.items():
            assert_as_exact_as(gradient, plain[name], truth[name].double())


@pytest.mark.parametrize(("part", "backend"), RUNS)
def test_blocks_share_graphs(part: str, backend: str) -> None:
    # The first block has no stream to add to, so it is not like the others.
    assert compiled_run(part, backend).n_graphs == (2 if part == "blocks" else 1)


def test_rope_turns_the_memory_of_the_projection() -> None:
    turned = 0
    for source in compiled_run(*RUNS[0]).sources:
        for name in re.findall(r"rope_\.default\(reinterpret_tensor\((\w+),", source):
            assert re.search(rf"mm\(.*out={name}\)", source)
            turned += 1
    assert turned == 2


def test_scalars_stay_what_they_are() -> None:
    sources = "\n".join(compiled_run(*RUNS[0]).sources)
    # A tensor or a symbol in the place of eps would be float64.
    assert re.search(rf"rms_norm_fwd\.default\(.*, {CONFIG.eps}\)", sources)
    assert not re.search("float64|fp64|double", sources)


def test_recomputed_rope_turns_once() -> None:
    (case,) = (case for case in CASES if case.name == "rope")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *inputs: checkpoint(case.run, *inputs, use_reentrant=False),
        fullgraph=True,
        dynamic=False,
        backend="aot_eager",
    )
    pairs = [outputs_and_gradients(run, case.inputs()) for run in (compiled, case.run)]
    assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))
