"""The loss curve of 200 updates on Triton operators is as exact as one on plain PyTorch."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from fastllama.config import ModelConfig
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE, TRITON, Operators
from tests.compare import DEVICE, assert_as_exact_as

N_UPDATES = 200
# The interpreter takes a tenth of a second per token.
BATCH_SIZE, SEQ_LEN = (1, 2) if DEVICE == "cpu" else (8, 32)
CONFIG = ModelConfig(
    vocab_size=16, n_embd=12, n_layers=1, n_heads=2, multiple_of=10, max_seq_len=SEQ_LEN
)


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences in which each token determines the next."""
    tokens = [torch.randint(16, (BATCH_SIZE, 1), generator=generator)]
    for _ in range(SEQ_LEN):
        tokens.append((5 * tokens[-1] + 3) % 16)
    sequences = torch.cat(tokens, dim=1).to(DEVICE)
    return sequences[:, :-1], sequences[:, 1:]


@torch.no_grad()
def reorder_channels(model: Llama, seed: int) -> None:
    """Permute the channels of the residual stream, which leaves the function the same.

    All sums over channels then run in another order, except those of attention.
    """
    order = torch.randperm(CONFIG.n_embd, generator=torch.Generator().manual_seed(seed))
    for name, weight in model.named_parameters():
        writes = name.endswith(("attention.output.weight", "mlp.down.weight"))
        weight.copy_(weight[order] if writes else weight[..., order])


def losses(
    operators: Operators,
    dtype: torch.dtype,
    *,
    order: int | None = None,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """The loss before each update, with weights in `dtype`."""
    with torch.device(DEVICE):
        model = Llama(CONFIG, operators)
    model.init_weights(seed=0)
    if order is not None:
        reorder_channels(model, seed=order)
    model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    curve = []
    for _ in range(N_UPDATES):
        with torch.autocast(DEVICE, autocast) if autocast else nullcontext():
            loss = model(*batch(generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.detach())
    return torch.stack(curve)


# Six trainings. `make test` compares every operator, and the gradients of the model.
@pytest.mark.slow
@pytest.mark.parametrize(
    "autocast",
    [None, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=["float32", "bfloat16"],
)
def test_curve_is_as_exact_as_plain_pytorch(autocast: torch.dtype | None) -> None:
    truth = losses(REFERENCE, torch.float64)
    # These four curves differ only in the order of their sums. Triton's kernels have another order
    # too, so the comparator allows twice the error of the worst curve.
    plain = [
        losses(REFERENCE, torch.float32, order=order, autocast=autocast)
        for order in (None, 1, 2, 3)
    ]
    worst = max(plain, key=lambda curve: (curve - truth).abs().max().item())
    actual = losses(TRITON, torch.float32, autocast=autocast)
    assert_as_exact_as(actual, worst, truth)
    # Two models that learn nothing would agree too.
    assert truth[-20:].mean() < truth[:20].mean() / 3
