"""The table of operators: how to call each one, and the facts that its contract depends on."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels import REFERENCE, TRITON, Operators
from tests.compare import DEVICE, Operator, assert_as_exact_as, randn
from tests.kernels.layouts import Layout, contiguous

B, T, D, V, E, FFN = 3, 2, 24, 11, 7, 24
HEADS, KV_HEADS, K = 3, 1, 4

# About the mean square of the inputs, so that an eps in the wrong place shows.
EPS = 0.5

Tensors = dict[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Arguments:
    """One call: leaves, tensors without a gradient, and the upstream gradients of the outputs."""

    inputs: Tensors
    constants: Tensors
    upstream: tuple[Tensor, ...]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Arguments":
        """Apply `change` to every tensor; the inputs become leaves again."""
        return Arguments(
            {
                name: change(x.detach()).requires_grad_(x.requires_grad)
                for name, x in self.inputs.items()
            },
            {name: change(x) for name, x in self.constants.items()},
            tuple(change(x) for x in self.upstream),
        )

    def floats(self) -> list[Tensor]:
        """Every tensor of a floating-point dtype."""
        tensors = [*self.inputs.values(), *self.constants.values(), *self.upstream]
        return [x for x in tensors if x.is_floating_point()]

    def frozen(self, trained: tuple[str, ...] = ()) -> "Arguments":
        """Only the inputs named in `trained` require a gradient."""
        inputs = {
            name: x.detach().requires_grad_(name in trained) for name, x in self.inputs.items()
        }
        return replace(self, inputs=inputs)


@dataclass(frozen=True)
class Case:
    """One operator with one set of options."""

    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    """(operators, *inputs, *constants) to outputs; all outputs are differentiable."""
    shapes: Callable[[int, int], dict[str, Shape]]
    """(B, T) to the shape of each input."""
    constants: Callable[[int, int, str], Tensors] = lambda B, T, device: {}
    """(B, T, device) to the arguments without a gradient."""
    outputs: tuple[str, ...] = ("out",)
    saved: tuple[str, ...] = ()
    """Inputs, constants and outputs that are saved for backward."""
    checked: tuple[str, ...] = ()
    """Inputs whose dtype the operator checks by name."""
    inplace: Literal["", "result", "gradient"] = ""
    """"result" overwrites a contiguous first input, "gradient" needs and overwrites one."""
    has_matmul: bool = False
    scale: float = 1.0
    """Standard deviation of the first input."""

    def __str__(self) -> str:
        return self.name

    def triton(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.call(TRITON, *tensors)

    def reference(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.call(REFERENCE, *tensors)

    def inputs(
        self, B: int = B, T: int = T, dtype: torch.dtype = torch.float32, device: str = DEVICE
    ) -> Tensors:
        shapes = self.shapes(B, T)
        inputs = {name: randn(*shapes[name], seed=seed) for seed, name in enumerate(shapes)}
        inputs[next(iter(shapes))] *= self.scale
        return {name: x.to(device, dtype) for name, x in inputs.items()}

    def arguments(
        self, B: int = B, T: int = T, dtype: torch.dtype = torch.float32, device: str = DEVICE
    ) -> Arguments:
        """The same numbers at every call, rounded to `dtype`."""
        inputs = self.inputs(B, T, dtype, device).values()
        return self.arguments_of(inputs, self.constants(B, T, device))

    def arguments_of(self, inputs: Iterable[Tensor], constants: Tensors | None = None) -> Arguments:
        """The call with these inputs, in the order of `shapes`."""
        leaves = (x.detach().requires_grad_() for x in inputs)
        named = dict(zip(self.shapes(B, T), leaves, strict=True))
        arguments = Arguments(named, constants or {}, ())
        with torch.no_grad():
            outputs = forward(self.reference, arguments)
        upstream = (
            # Rounded to bfloat16 first, so that every dtype gets the same numbers.
            randn(*x.shape, seed=100 + i, dtype=torch.bfloat16).to(x.device, x.dtype)
            for i, x in enumerate(outputs)
        )
        return replace(arguments, upstream=tuple(upstream))

    def of_inputs(self, operator: Operator, T: int = T) -> Operator:
        """Bind the constants to `triton` or `reference`."""
        constants = list(self.constants(B, T, DEVICE).values())
        return lambda *inputs: operator(*inputs, *constants)


def forward(operator: Operator, arguments: Arguments) -> tuple[Tensor, ...]:
    outputs = operator(*arguments.inputs.values(), *arguments.constants.values())
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def backward(
    outputs: tuple[Tensor, ...], arguments: Arguments, **options: bool
) -> tuple[Tensor, ...]:
    inputs = tuple(arguments.inputs.values())
    return torch.autograd.grad(outputs, inputs, arguments.upstream, **options)


def run(operator: Operator, arguments: Arguments) -> list[Tensor]:
    """Outputs, then gradients; no argument is copied."""
    outputs = forward(operator, arguments)
    return [*outputs, *backward(outputs, arguments)]


def forward_and_saved(
    operator: Operator, arguments: Arguments
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs, and the tensors saved for backward."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return forward(operator, arguments), saved


def assert_exact(case: Case, arguments: Arguments) -> None:
    """Hold outputs and gradients to the comparator, whatever the layout of `arguments`."""
    plain = arguments.map(contiguous)
    truth = plain.map(lambda x: x.double() if x.is_floating_point() else x)
    expected = [run(case.reference, plain), run(case.reference, truth)]
    for results in zip(run(case.triton, arguments), *expected, strict=True):
        assert_as_exact_as(*results)


def assert_exact_on(case: Case, inputs: Iterable[Tensor], layout: Layout = contiguous) -> None:
    """The same for these inputs, everything in `layout`."""
    assert_exact(case, case.arguments_of(inputs).map(layout))


def norm_case(
    name: str, call: Operator, inputs: str, saved: str, width: int = D, **fields: Any
) -> Case:
    names = tuple(inputs.split())

    def shapes(B: int, T: int) -> dict[str, Shape]:
        rows = (B, T, width)
        every = {"x": rows, "residual": rows, "weight": (width,), "projection": (E, width)}
        return {name: every[name] for name in names}

    checked = tuple(name for name in names if name != "projection")
    return Case(name, call, shapes, saved=tuple(saved.split()), checked=checked, **fields)


def rms_norm_case(width: int = D, suffix: str = "") -> Case:
    return norm_case(
        "rms_norm" + suffix,
        lambda operators, x, weight: operators.rms_norm(x, weight, EPS),
        "x weight",
        saved="x weight",
        width=width,
    )


def add_rms_norm_case(width: int = D, suffix: str = "") -> Case:
    return norm_case(
        "add_rms_norm" + suffix,
        lambda operators, x, residual, weight: operators.add_rms_norm(x, residual, weight, EPS),
        "x residual weight",
        saved="stream weight",
        width=width,
        outputs=("out", "stream"),
    )


def add_rms_norm_linear_case(width: int = D, suffix: str = "") -> Case:
    return norm_case(
        "add_rms_norm_linear" + suffix,
        lambda operators, x, residual, weight, projection: operators.add_rms_norm_linear(
            x, residual, weight, EPS, projection
        ),
        "x residual weight projection",
        saved="stream weight projection",
        width=width,
        outputs=("out", "stream"),
        has_matmul=True,
    )


WITHOUT_RESIDUAL = [
    norm_case(
        "add_rms_norm-no_residual",
        lambda operators, x, weight: operators.add_rms_norm(x, None, weight, EPS),
        "x weight",
        saved="x weight",
        outputs=("out", "stream"),
    ),
    norm_case(
        "add_rms_norm_linear-no_residual",
        lambda operators, x, weight, projection: operators.add_rms_norm_linear(
            x, None, weight, EPS, projection
        ),
        "x weight projection",
        saved="x weight projection",
        outputs=("out", "stream"),
        has_matmul=True,
    ),
]


def tables(n_positions: int, width: int, device: str = DEVICE) -> Tensors:
    """cos and sin (P, R), computed on `device`."""
    frequencies = 1 / torch.arange(1, width // 2 + 1, device=device)
    angles = torch.outer(torch.arange(n_positions, device=device).float(), frequencies)
    return {"cos": angles.cos(), "sin": angles.sin()}


def rope_case(
    *,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    width: int = K,
    positions: bool = False,
    suffix: str = "",
) -> Case:
    def constants(B: int, T: int, device: str) -> Tensors:
        constants = tables(T + 3, width, device)
        if positions:
            # Out of order, some twice.
            constants["positions"] = (7 * torch.arange(B * T, device=device)).view(B, T) % (T + 3)
        return constants

    def call(
        operators: Operators, qkv: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return operators.rope(qkv, cos, sin, heads, kv_heads, rows)

    return Case(
        ("rope-positions" if positions else "rope") + suffix,
        call,
        lambda B, T: {"qkv": (B, T, (heads + 2 * kv_heads) * width)},
        constants,
        outputs=("q", "k", "v"),
        saved=("cos", "sin", "positions") if positions else ("cos", "sin"),
        checked=("qkv",),
        inplace="result",
    )


def swiglu_case(width: int = FFN, suffix: str = "") -> Case:
    return Case(
        "swiglu" + suffix,
        lambda operators, gate_up: operators.swiglu(gate_up),
        lambda B, T: {"gate_up": (B, T, 2 * width)},
        saved=("gate_up",),
        checked=("gate_up",),
        # Wide enough for gates on which sigmoid is near 0 and 1.
        scale=3.0,
    )


def swiglu_linear_case(width: int = FFN, suffix: str = "") -> Case:
    return replace(
        swiglu_case(width),
        name="swiglu_linear" + suffix,
        call=lambda operators, gate_up, down: operators.swiglu_linear(gate_up, down),
        shapes=lambda B, T: {"gate_up": (B, T, 2 * width), "down": (E, width)},
        saved=("gate_up", "down"),
        has_matmul=True,
    )


def some_ignored(n_rows: int, vocab_size: int, device: str = DEVICE) -> Tensor:
    """Targets (N,); every fourth is ignored."""
    targets = torch.arange(n_rows, device=device) % vocab_size
    targets[1::4] = -100
    return targets


EVERY_OPTION = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0}


def cross_entropy_case(
    name: str, *, inplace: bool = False, vocab_size: int = V, **options: Any
) -> Case:
    def call(operators: Operators, logits: Tensor, targets: Tensor) -> Tensor | tuple[Tensor, ...]:
        loss, lse = operators.cross_entropy(logits, targets, inplace=inplace, **options)
        # In place, lse has no gradient.
        return loss if inplace else (loss, lse)

    return Case(
        name,
        call,
        lambda B, T: {"logits": (B * T, vocab_size)},
        lambda B, T, device: {"targets": some_ignored(B * T, vocab_size, device)},
        outputs=("loss",) if inplace else ("loss", "lse"),
        saved=("logits",) if inplace else ("logits", "targets"),
        checked=("logits",),
        inplace="gradient" if inplace else "",
        scale=3.0,
    )


def set_chunk_length(n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make linear_cross_entropy run in chunks of `n_tokens`."""
    # As an attribute of the package, the name is the function.
    module = sys.modules["fastllama_kernels.linear_cross_entropy"]
    monkeypatch.setattr(module, "chunk_length", lambda *_: n_tokens)
    monkeypatch.setattr(module, "CPU_CHUNK_LENGTH", n_tokens)


def linear_cross_entropy_case(name: str, **options: Any) -> Case:
    return Case(
        name,
        lambda operators, hidden, weight, targets: operators.linear_cross_entropy(
            hidden, weight, targets, **options
        ),
        lambda B, T: {"hidden": (B, T, D), "weight": (V, D)},
        lambda B, T, device: {"targets": some_ignored(B * T, V, device).view(B, T)},
        outputs=("loss",),
        checked=("hidden",),
        has_matmul=True,
        # The logits then have a standard deviation of 1.
        scale=D**-0.5,
    )


CASES = [
    rms_norm_case(),
    add_rms_norm_case(),
    add_rms_norm_linear_case(),
    *WITHOUT_RESIDUAL,
    rope_case(),
    rope_case(positions=True),
    swiglu_case(),
    swiglu_linear_case(),
    cross_entropy_case("cross_entropy"),
    cross_entropy_case("cross_entropy-none", reduction="none", **EVERY_OPTION),
    cross_entropy_case("cross_entropy-inplace", inplace=True),
    cross_entropy_case(
        "cross_entropy-inplace-none", inplace=True, reduction="none", **EVERY_OPTION
    ),
    linear_cross_entropy_case("linear_cross_entropy"),
    linear_cross_entropy_case("linear_cross_entropy-sum", reduction="sum", **EVERY_OPTION),
]

SUMS = [
    cross_entropy_case("cross_entropy-sum", reduction="sum"),
    cross_entropy_case("cross_entropy-inplace-sum", inplace=True, reduction="sum"),
]

WIDE = [
    rms_norm_case(33_000, "-wide"),
    add_rms_norm_linear_case(33_000, "-wide"),
    rope_case(heads=9, suffix="-wide"),
    swiglu_case(1_025, "-wide"),
    swiglu_linear_case(1_025, "-wide"),
    cross_entropy_case("cross_entropy-wide", vocab_size=32_769, z_loss=0.01),
    cross_entropy_case("cross_entropy-inplace-wide", inplace=True, vocab_size=32_769, z_loss=0.01),
]
"""Rows of more than one block."""

LARGE = [
    (add_rms_norm_case(2_048), 2**31 // 2_048 + 2, 1),
    # h has more than 2^31 elements and gate_up more than 2^32.
    (swiglu_case(2_048), 2**31 // 2_048 + 2, 1),
    (rope_case(heads=8, kv_heads=4, width=128), 2**31 // (1_024 * 16 * 128) + 2, 1_024),
    (cross_entropy_case("cross_entropy", vocab_size=32_768, reduction="none"), 2**16 + 2, 1),
    (
        cross_entropy_case(
            "cross_entropy-inplace", inplace=True, vocab_size=32_768, reduction="none"
        ),
        2**16 + 2,
        1,
    ),
]
"""Cases, B and T with more elements than int32 counts, for a GPU."""


def attention_of_rope(
    operators: Operators, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Rope rotates the result of a matmul, and attention saves its views."""
    qkv = operators.rope(F.linear(x, weight), cos, sin, HEADS, KV_HEADS)
    return operators.attention(*qkv)


def loss_of_linear(*, inplace: bool) -> Case:
    """Cross-entropy of the result of a matmul."""

    def call(operators: Operators, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(x.flatten(0, 1), weight)
        return operators.cross_entropy(logits, targets, inplace=inplace)[0]

    return Case(
        "cross_entropy-inplace",
        call,
        lambda B, T: {"x": (B, T, D), "weight": (V, D)},
        lambda B, T, device: {"targets": some_ignored(B * T, V, device)},
    )


IN_MODEL = [
    *(case for case in CASES if not case.inplace),
    Case(
        "rope",
        attention_of_rope,
        lambda B, T: {"x": (B, T, D), "weight": ((HEADS + 2 * KV_HEADS) * K, D)},
        lambda B, T, device: tables(T, K, device),
    ),
    loss_of_linear(inplace=True),
]
"""Cases as in a model: operators that write in place write to the result of a matmul."""
