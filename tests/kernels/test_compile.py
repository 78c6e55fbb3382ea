"""torch.compile over the operators: one graph, the same numbers, no copies, no wider dtypes.

On the CPU Inductor writes C++ around the operators; Triton's interpreter runs the operators.
"""

import dataclasses
import itertools
import re
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from fastllama_kernels import REFERENCE, TRITON
from fastllama_kernels.linear_cross_entropy import (
    HAS_COMPILED_REGIONS,
    linear_cross_entropy_cpu,
    linear_cross_entropy_reference,
)
from tests.compare import DEVICE, Operator, assert_as_exact_as, outputs_and_gradients, randn
from tests.kernels.operator_cases import IN_MODEL, Case, set_chunk_length
from tests.kernels.small_model import MULTI_HEAD, loss_and_gradients, random_tokens, small_model

# PyTorch warns about its own code.
pytestmark = pytest.mark.filterwarnings("ignore")

# The third layer can share the graph of the second.
CONFIG = dataclasses.replace(MULTI_HEAD, n_layers=3)

# The trainer compiles the blocks. The model adds norm and loss, for which Inductor takes too long
# on the CPU.
RUNS = [("blocks", "inductor"), ("model", "aot_eager" if DEVICE == "cpu" else "inductor")]


@dataclass(frozen=True)
class Run:
    """Two updates of a compiled model; the second may compile nothing."""

    gradients: list[dict[str, Tensor]]
    n_graphs: int
    sources: list[str]
    """The code of Inductor, forwards and backwards."""


def batch(number: int) -> Tensor:
    """Tokens and targets."""
    return random_tokens(CONFIG, 2, 1, 3, seed=number)


@cache
def eager_runs(number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Triton operators, and plain PyTorch in float64."""
    plain, exact = small_model(CONFIG, TRITON), small_model(CONFIG, REFERENCE, exact=True)
    return loss_and_gradients(plain, *batch(number)), loss_and_gradients(exact, *batch(number))


@cache
def compiled_run(part: str, backend: str) -> Run:
    model = small_model(CONFIG, TRITON)
    torch._dynamo.reset()
    counters.clear()
    for module in model.blocks if part == "blocks" else [model]:
        # The model embeds before its graph.
        module.compile(fullgraph=part == "blocks", dynamic=False, backend=backend)
    # A cached graph has no source.
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


def assert_compiles(compiled: Operator, case: Case) -> None:
    inputs = list(case.inputs().values())
    results = outputs_and_gradients(compiled, inputs)
    expected = outputs_and_gradients(case.of_inputs(case.triton), inputs)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("case", IN_MODEL, ids=str)
def test_operator_is_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    operator = case.of_inputs(case.triton)
    assert_compiles(
        torch.compile(operator, fullgraph=True, dynamic=False, backend="aot_eager"), case
    )


@pytest.mark.parametrize(("part", "backend"), RUNS)
def test_gradients_match_eager(part: str, backend: str) -> None:
    for number, found in enumerate(compiled_run(part, backend).gradients):
        plain, truth = eager_runs(number)
        assert found.keys() == plain.keys()
        for name, gradient in found.items():
            assert_as_exact_as(gradient, plain[name], truth[name].double())


@pytest.mark.parametrize(("part", "backend"), RUNS)
def test_blocks_share_graphs(part: str, backend: str) -> None:
    # The first block has no residual stream and so a graph of its own.
    assert compiled_run(part, backend).n_graphs == (2 if part == "blocks" else 1)


def test_rope_rotates_the_memory_of_the_projection() -> None:
    n_rotations = 0
    for source in compiled_run(*RUNS[0]).sources:
        for name in re.findall(r"rope_\.default\(reinterpret_tensor\((\w+),", source):
            assert re.search(rf"mm\(.*out={name}\)", source)
            n_rotations += 1
    assert n_rotations == 2


def test_scalars_stay_python_floats() -> None:
    sources = "\n".join(compiled_run(*RUNS[0]).sources)
    # As a tensor or a symbol, eps would be float64.
    assert re.search(rf"rms_norm_fwd\.default\(.*, {CONFIG.eps}\)", sources)
    assert not re.search("float64|fp64|double", sources)


def test_recomputed_rope_rotates_once() -> None:
    (case,) = (case for case in IN_MODEL if case.name == "rope")
    operator = case.of_inputs(case.triton)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *inputs: checkpoint(operator, *inputs, use_reentrant=False),
        fullgraph=True,
        dynamic=False,
        backend="aot_eager",
    )
    assert_compiles(compiled, case)


@pytest.mark.skipif(not HAS_COMPILED_REGIONS, reason="PyTorch 2.11 compiles no regions")
def test_compiled_cpu_loss_has_logits_of_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    n_tokens, length, width, vocab_size = 512, 32, 16, 2048
    set_chunk_length(length, monkeypatch)
    inputs = [
        randn(n, width, seed=n, dtype=torch.float32).requires_grad_()
        for n in (n_tokens, vocab_size)
    ]
    targets = torch.arange(n_tokens, device=DEVICE)
    run = torch.compile(linear_cross_entropy_cpu, fullgraph=True, dynamic=False)
    # Compiles and allocates what it keeps.
    run(*inputs, targets)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = run(*inputs, targets)
    torch.testing.assert_close(loss, linear_cross_entropy_reference(*inputs, targets))
    # Logits and their gradient; the exponentials of a row stay in a buffer of the kernel.
    chunk = 2 * 4 * length * vocab_size
    # Of every chunk there is a gradient of the weight, until all are summed.
    weight = 4 * width * vocab_size * (n_tokens // length + 2)
    assert peak_bytes(profiler) <= 1.5 * chunk + weight


def peak_bytes(profiler: profile) -> int:
    """The most bytes that were allocated at once since the profile began."""
    events = [
        event
        for event in profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    events.sort(key=lambda event: event.start_ns())
    assert events
    return max(itertools.accumulate(event.nbytes() for event in events))
