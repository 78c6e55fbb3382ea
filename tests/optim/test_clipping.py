"""One update: clipping against PyTorch's, and skipping without a trace."""

import math

import pytest
import torch
from torch import Tensor, nn

from fastllama.model.llama import Llama
from fastllama.optim.clipping import update
from tests.compare import assert_as_exact_as, randn
from tests.optim.small_model import CONFIG, build, is_decayed

FINITE_LOSS = torch.tensor(1.0)


def set_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Set normal gradients with this standard deviation, the same for every dtype."""
    for number, parameter in enumerate(model.parameters()):
        values = scale * randn(
            *parameter.shape, seed=100 * seed + number, dtype=torch.float32, device="cpu"
        )
        parameter.grad = values.to(parameter.dtype)


def state_copy(model: Llama, optimizer: torch.optim.AdamW) -> list[Tensor]:
    """Copies of the weights, moments and step counts."""
    live = [x for p in model.parameters() for x in (p, *optimizer.state[p].values())]
    return [x.detach().clone() for x in live]


def plain_adamw(model: Llama) -> torch.optim.AdamW:
    """PyTorch's AdamW with a loop over parameters, each in its own group."""
    return torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": CONFIG.weight_decay if is_decayed(name) else 0.0}
            for name, p in model.named_parameters()
        ],
        lr=CONFIG.max_lr,
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.adam_eps,
        foreach=False,
    )


def test_agrees_with_clip_grad_norm_and_plain_adamw() -> None:
    model, optimizer = build()
    plain, truth = build()[0], build()[0].double()
    plain_optimizers = {plain: plain_adamw(plain), truth: plain_adamw(truth)}
    # The third gradient is smaller than the limit, and must not be scaled up to it.
    for seed, scale in enumerate((1.0, 30.0, 1e-3, 5.0)):
        norms = []
        for other, plain_optimizer in plain_optimizers.items():
            set_gradients(other, seed, scale)
            norms.append(nn.utils.clip_grad_norm_(other.parameters(), max_norm=1.0))
            plain_optimizer.step()
        set_gradients(model, seed, scale)
        norm, skipped = update(optimizer, FINITE_LOSS, max_norm=1.0)
        assert_as_exact_as(norm, *norms)
        assert skipped == 0
        # Gradients that stay would be added to the next ones.
        assert all(p.grad is None for p in model.parameters())
    for weights in zip(model.parameters(), plain.parameters(), truth.parameters(), strict=True):
        assert_as_exact_as(*weights)


def test_max_norm_0_never_clips() -> None:
    model, optimizer = build()
    unclipped_model, unclipped_optimizer = build()
    for each in (model, unclipped_model):
        set_gradients(each, seed=0, scale=1e3)
    unclipped_optimizer.step()
    norm, skipped = update(optimizer, FINITE_LOSS, max_norm=0.0)
    assert norm > 1e3
    assert skipped == 0
    expected = state_copy(unclipped_model, unclipped_optimizer)
    for found, wanted in zip(state_copy(model, optimizer), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("max_norm", [1.0, 0.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_skipped_update_changes_nothing(where: str, bad: float, max_norm: float) -> None:
    runs = build(), build()
    for model, optimizer in runs:
        set_gradients(model, seed=0)
        update(optimizer, FINITE_LOSS, max_norm)

    model, optimizer = runs[0]
    before = state_copy(model, optimizer)
    set_gradients(model, seed=1)
    if where == "gradient":
        gradient = dict(model.named_parameters())["blocks.1.mlp.down.weight"].grad
        assert gradient is not None
        gradient[0, 3] = bad
    loss = torch.tensor(bad) if where == "loss" else FINITE_LOSS
    _, skipped = update(optimizer, loss, max_norm)
    assert skipped == 1
    for after, then in zip(state_copy(model, optimizer), before, strict=True):
        assert torch.equal(after, then)

    # The next update gives the same state as in a run without the skipped update.
    for model, optimizer in runs:
        set_gradients(model, seed=2)
        _, skipped = update(optimizer, FINITE_LOSS, max_norm)
        assert skipped == 0
    for found, wanted in zip(state_copy(*runs[0]), state_copy(*runs[1]), strict=True):
        assert torch.equal(found, wanted)
