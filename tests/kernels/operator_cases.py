"""Every operator of `TRITON`, with what writes to its input given one made on the way."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels import TRITON
from tests.compare import DEVICE, Operator, randn

B, T, D, V, EPS = 2, 3, 12, 11, 1e-5
HEADS, KV_HEADS, K = 3, 1, 4
FFN = 10


@dataclass(frozen=True)
class Case:
    """An operator as a function of its differentiable inputs, and their shapes."""

    name: str
    run: Operator
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(self.shapes)]


def targets() -> Tensor:
    return torch.arange(B * T, device=DEVICE).reshape(B, T)


def tables() -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(T), 1 / torch.arange(1, K // 2 + 1)).to(DEVICE)
    return angles.cos(), angles.sin()


def attend(x: Tensor, weight: Tensor) -> Tensor:
    """Attention, which saves what rope has turned in the memory of the projection."""
    return TRITON.attention(*TRITON.rope(F.linear(x, weight), *tables(), HEADS, KV_HEADS))


def loss_in_logits(x: Tensor, weight: Tensor, *, inplace: bool = True) -> Tensor:
    """Cross-entropy whose gradient takes the memory of the logits."""
    logits = F.linear(x.flatten(0, 1), weight)
    return TRITON.cross_entropy(logits, targets().flatten(), inplace=inplace)[0]


ROWS, PROJECTION = (B, T, D), (7, D)
RUNS: dict[str, tuple[Operator, tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (lambda x, w: TRITON.rms_norm(x, w, EPS), (ROWS, (D,))),
    "add_rms_norm": (lambda x, r, w: TRITON.add_rms_norm(x, r, w, EPS), (ROWS, ROWS, (D,))),
    "add_rms_norm_linear": (
        lambda x, r, w, p: TRITON.add_rms_norm_linear(x, r, w, EPS, p),
        (ROWS, ROWS, (D,), PROJECTION),
    ),
    "first add_rms_norm_linear": (
        lambda x, w, p: TRITON.add_rms_norm_linear(x, None, w, EPS, p),
        (ROWS, (D,), PROJECTION),
    ),
    "rope": (attend, (ROWS, ((HEADS + 2 * KV_HEADS) * K, D))),
    "swiglu": (TRITON.swiglu, ((B, T, 2 * FFN),)),
    "swiglu_linear": (TRITON.swiglu_linear, ((B, T, 2 * FFN), (D, FFN))),
    "cross_entropy": (
        lambda logits: TRITON.cross_entropy(logits, targets().flatten()),
        ((B * T, V),),
    ),
    "cross_entropy inplace": (loss_in_logits, (ROWS, (V, D))),
    "linear_cross_entropy": (
        lambda x, w: TRITON.linear_cross_entropy(x, w, targets()),
        (ROWS, (V, D)),
    ),
}

CASES = [Case(name, run, shapes) for name, (run, shapes) in RUNS.items()]
