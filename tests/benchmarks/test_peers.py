"""Operators of other libraries compute the same as the reference."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from threading import Thread

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._functorch import config as functorch_config

from benchmarks.operators.case import Provider
from benchmarks.operators.peers import EAGER, LIBRARIES, peers
from fastllama_kernels import REFERENCE
from tests.compare import DEVICE, Operator, assert_operator_as_exact_as, randn

EPS = 1e-5
B, T, D, V, N = 2, 3, 24, 48, 16
HEADS, KV_HEADS, K = 4, 2, 16


pytestmark = pytest.mark.filterwarnings(
    # Raised while PyTorch's compiler imports its modules.
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
)


@pytest.fixture(autouse=True)
def compiler_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the settings that `compiled` changes."""
    entry = functorch_config._config["donated_buffer"]
    monkeypatch.setattr(entry, "default", entry.default)
    with functorch_config.patch(donated_buffer=True):
        yield


def tables() -> tuple[Tensor, Tensor]:
    """cos and sin, with more positions than the sequences have."""
    angles = torch.outer(torch.arange(T + 2), 1 / torch.arange(1, K // 2 + 1)).to(DEVICE)
    return angles.cos(), angles.sin()


def targets() -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def reference_loss(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return REFERENCE.cross_entropy(logits_NV, targets_N)[0]


@dataclass(frozen=True)
class Case:
    """Reference of an operator, its call, and the shapes of its differentiable inputs."""

    reference: Operator
    bind: Callable[[Operator], Operator]
    shapes: tuple[tuple[int, ...], ...]


CASES = {
    "rms_norm": Case(
        REFERENCE.rms_norm, lambda run: lambda x, w: run(x, w, EPS), ((B, T, D), (D,))
    ),
    "add_rms_norm": Case(
        REFERENCE.add_rms_norm,
        lambda run: lambda x, r, w: run(x, r, w, EPS),
        ((B, T, D), (B, T, D), (D,)),
    ),
    "rope": Case(
        REFERENCE.rope,
        lambda run: lambda qkv: run(qkv, *tables(), HEADS, KV_HEADS),
        ((B, T, (HEADS + 2 * KV_HEADS) * K),),
    ),
    "add_rms_norm_linear": Case(
        REFERENCE.add_rms_norm_linear,
        lambda run: lambda x, r, w, p: run(x, r, w, EPS, p),
        ((B, T, D), (B, T, D), (D,), (V, D)),
    ),
    "swiglu_linear": Case(
        REFERENCE.swiglu_linear, lambda run: lambda x, w: run(x, w), ((B, T, 2 * D), (V, D))
    ),
    "swiglu": Case(REFERENCE.swiglu, lambda run: lambda x: run(x), ((B, T, 2 * D),)),
    "cross_entropy": Case(
        reference_loss, lambda run: lambda logits: run(logits, targets()), ((N, V),)
    ),
    "linear_cross_entropy": Case(
        REFERENCE.linear_cross_entropy,
        lambda run: lambda hidden, weight: run(hidden, weight, targets()),
        ((N, D), (V, D)),
    ),
}

COMPILED_ON_CPU = {"rms_norm"}
"""Compiling takes over a second per operator, so a CPU tests only one."""

LIGER_ON_CPU = {"rope", "swiglu", "cross_entropy", "linear_cross_entropy"}
"""Liger's norms convert scalar arguments, which are Python floats in Triton's interpreter."""

MODULES = ("liger_kernel", "quack", "flash_attn", "cut_cross_entropy")


def runs_here(operator: str, peer: Provider) -> bool:
    if DEVICE == "cuda" or peer.name in ("eager", "pytorch"):
        return True
    if peer.name == "compiled":
        return operator in COMPILED_ON_CPU
    return peer.name == "liger" and operator in LIGER_ON_CPU


def peers_that(condition: Callable[[str, Provider], bool]) -> pytest.MarkDecorator:
    pairs = [(operator, peer) for operator in EAGER for peer in peers(operator)]
    return pytest.mark.parametrize(
        ("operator", "peer"),
        [
            pytest.param(operator, peer, id=f"{operator}-{peer.name}")
            for operator, peer in pairs
            if condition(operator, peer)
        ],
    )


def make(peer: Provider) -> Operator:
    try:
        return peer.make()
    except ImportError:
        pytest.skip(f"{peer.package} is not installed")


def leaves(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [
        randn(*shape, seed=seed, dtype=dtype).requires_grad_()
        for seed, shape in enumerate(case.shapes)
    ]


def run(case: Case, operator: Operator, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    outputs = case.bind(operator)(*inputs)
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def test_every_operator_has_plain_pytorch_peers() -> None:
    assert LIBRARIES.keys() < EAGER.keys() == CASES.keys()
    for operator in EAGER:
        assert [peer.name for peer in peers(operator)][:2] == ["eager", "compiled"]


@peers_that(runs_here)
def test_peers_match_reference(operator: str, peer: Provider) -> None:
    case = CASES[operator]
    actual = case.bind(make(peer))
    reference = case.bind(case.reference)
    inputs = [x.detach() for x in leaves(case, peer.dtypes[0])]
    assert_operator_as_exact_as(actual, reference, reference, inputs)


@peers_that(runs_here)
def test_repeated_backward(operator: str, peer: Provider) -> None:
    case = CASES[operator]
    actual = make(peer)
    inputs = leaves(case, peer.dtypes[0])
    outputs = run(case, actual, inputs)
    torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])
    outputs = run(case, actual, inputs)

    gradients: list[tuple[Tensor, ...]] = []

    def repeat() -> None:
        for _ in range(2):
            ones = [torch.ones_like(x) for x in outputs]
            gradients.append(torch.autograd.grad(outputs, inputs, ones, retain_graph=True))

    # In another thread than the compiling one, as in autograd on a GPU.
    thread = Thread(target=repeat)
    thread.start()
    thread.join()
    first, second = gradients
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_recompile_limit_is_per_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    # The eager backend avoids the compile time of Inductor.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (5, 6):
            rms_norm = peers("rms_norm")[1].make()
            rms_norm(randn(1, width, seed=0), randn(width, seed=1), EPS)
        with pytest.raises(FailOnRecompileLimitHit):
            rms_norm(randn(1, 7, seed=0), randn(7, seed=1), EPS)


@peers_that(lambda _, peer: peer.package != "torch")
def test_missing_package_raises_import_error(
    operator: str, peer: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        monkeypatch.delitem(sys.modules, loaded)
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError):
        peer.make()


def test_old_pytorch_raises_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.nn.functional.linear_cross_entropy", raising=False)
    with pytest.raises(ImportError):
        LIBRARIES["linear_cross_entropy"][0].make()
