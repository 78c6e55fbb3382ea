import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from fastllama.config import ModelConfig, OptimizerConfig
from fastllama.model.llama import Llama
from fastllama.optim.adamw import build_optimizer
from fastllama.optim.clipping import update
from fastllama_kernels import REFERENCE
from tests.compare import assert_as_exact_as, randn

MODEL = ModelConfig(vocab_size=32, n_embd=16, n_layers=2, n_heads=2, multiple_of=16, max_seq_len=8)
# A decay this large cannot be overlooked.
CONFIG = OptimizerConfig(max_lr=1e-2, weight_decay=0.5)
GOOD = torch.tensor(1.0)


def build(tied: bool = False) -> tuple[Llama, torch.optim.AdamW]:
    model = Llama(dataclasses.replace(MODEL, tied_embeddings=tied), REFERENCE)
    model.init_weights(seed=0)
    return model, build_optimizer(model, CONFIG)


def set_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    for number, parameter in enumerate(model.parameters()):
        values = scale * randn(
            *parameter.shape, seed=100 * seed + number, dtype=torch.float32, device="cpu"
        )
        parameter.grad = values.to(parameter.dtype)


def everything(model: Llama, optimizer: torch.optim.AdamW) -> list[Tensor]:
    """Copies of the weights, moments and step counts."""
    live = [x for p in model.parameters() for x in (p, *optimizer.state[p].values())]
    return [x.detach().clone() for x in live]


def is_decayed(name: str) -> bool:
    return "norm" not in name and name != "embedding.weight"


def adamw(model: Llama) -> torch.optim.AdamW:
    """PyTorch's own, neither fused nor grouped by us."""
    return torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": 0.5 if is_decayed(name) else 0.0}
            for name, p in model.named_parameters()
        ],
        lr=CONFIG.max_lr,
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.adam_eps,
        foreach=False,
    )


def test_is_adamw_after_clipping() -> None:
    model, optimizer = build()
    plain, truth = build()[0], build()[0].double()
    others = {plain: adamw(plain), truth: adamw(truth)}
    # The third gradient is below the limit and must not be scaled up to it.
    for seed, scale in enumerate((1.0, 30.0, 1e-3, 5.0)):
        norms = []
        for twin, ordinary in others.items():
            set_gradients(twin, seed, scale)
            norms.append(nn.utils.clip_grad_norm_(twin.parameters(), max_norm=1.0))
            ordinary.step()
        set_gradients(model, seed, scale)
        norm, refused = update(optimizer, GOOD, max_norm=1.0)
        assert_as_exact_as(norm, *norms)
        assert refused == 0
        # Left over, they would be added to the next ones.
        assert all(p.grad is None for p in model.parameters())
    for weights in zip(model.parameters(), plain.parameters(), truth.parameters(), strict=True):
        assert_as_exact_as(*weights)


def test_a_limit_of_0_clips_nothing() -> None:
    model, optimizer = build()
    unclipped, ordinary = build()
    for twin in (model, unclipped):
        set_gradients(twin, seed=0, scale=1e3)
    ordinary.step()
    norm, refused = update(optimizer, GOOD, max_norm=0.0)
    assert norm > 1e3
    assert refused == 0
    for now, wanted in zip(
        everything(model, optimizer), everything(unclipped, ordinary), strict=True
    ):
        assert torch.equal(now, wanted)


@pytest.mark.parametrize("max_norm", [1.0, 0.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_bad_update_leaves_no_trace(where: str, bad: float, max_norm: float) -> None:
    runs = build(), build()
    for model, optimizer in runs:
        set_gradients(model, seed=0)
        update(optimizer, GOOD, max_norm)

    model, optimizer = runs[0]
    before = everything(model, optimizer)
    set_gradients(model, seed=1)
    if where == "gradient":
        gradient = dict(model.named_parameters())["blocks.1.mlp.down.weight"].grad
        assert gradient is not None
        gradient[0, 3] = bad
    loss = torch.tensor(bad) if where == "loss" else GOOD
    _, refused = update(optimizer, loss, max_norm)
    assert refused == 1
    for now, then in zip(everything(model, optimizer), before, strict=True):
        assert torch.equal(now, then)

    for model, optimizer in runs:
        set_gradients(model, seed=2)
        _, refused = update(optimizer, GOOD, max_norm)
        assert refused == 0
    for now, wanted in zip(everything(*runs[0]), everything(*runs[1]), strict=True):
        assert torch.equal(now, wanted)
