import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from fastllama.config import ModelConfig, OptimizerConfig
from fastllama.model import Llama
from fastllama.optimizer import build_optimizer, update
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
        values = scale * randn(*parameter.shape, seed=100 * seed + number, dtype=torch.float32)
        parameter.grad = values.to(parameter.dtype)


def everything(model: Llama, optimizer: torch.optim.AdamW) -> list[Tensor]:
    """Copies of the weights, moments and step counts."""
    live = [x for p in model.parameters() for x in (p, *optimizer.state[p].values())]
    return [x.detach().clone() for x in live]


@pytest.mark.parametrize("tied", [False, True])
def test_decays_matrices_and_not_norms_or_embeddings(tied: bool) -> None:
    model, optimizer = build(tied)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    decayed = {name for name, p in model.named_parameters() if decay[id(p)] == 0.5}
    kept = {name for name, p in model.named_parameters() if decay[id(p)] == 0.0}
    parts = ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
    matrices = {f"blocks.{layer}.{part}.weight" for layer in range(2) for part in parts}
    norms = {f"blocks.{i}.{part}_norm.weight" for i in range(2) for part in ("attention", "mlp")}
    # A tied output projection is the embedding.
    assert decayed == matrices | (set() if tied else {"output.weight"})
    assert kept == norms | {"norm.weight", "embedding.weight"}


def test_is_adamw_after_clipping() -> None:
    model, optimizer = build()
    twins = []
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(model).to(dtype)
        groups = [
            {"params": [p for p in twin.parameters() if p.ndim == 1], "weight_decay": 0.0},
            {"params": [twin.embedding.weight], "weight_decay": 0.0},
            {
                "params": [
                    p for p in twin.parameters() if p.ndim == 2 and p is not twin.embedding.weight
                ]
            },
        ]
        twins.append(
            (
                twin,
                torch.optim.AdamW(
                    groups,
                    lr=CONFIG.max_lr,
                    betas=(CONFIG.beta1, CONFIG.beta2),
                    eps=CONFIG.adam_eps,
                    weight_decay=CONFIG.weight_decay,
                    foreach=False,
                ),
            )
        )
    # The third is below the limit and must not be scaled up to it.
    for seed, scale in enumerate((1.0, 30.0, 1e-3, 5.0)):
        norms = []
        for twin, ordinary in twins:
            set_gradients(twin, seed, scale)
            norms.append(nn.utils.clip_grad_norm_(twin.parameters(), 1.0))
            ordinary.step()
        set_gradients(model, seed, scale)
        norm, refused = update(optimizer, GOOD, max_norm=1.0)
        assert refused == 0
        assert_as_exact_as(norm, *norms)
        assert all(p.grad is None for p in model.parameters())
    (plain, _), (truth, _) = twins
    for actual, ordinary, exact in zip(
        model.parameters(), plain.parameters(), truth.parameters(), strict=True
    ):
        assert_as_exact_as(actual.detach(), ordinary.detach(), exact.detach())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_bad_update_leaves_no_trace(where: str, bad: float) -> None:
    runs = build(), build()
    for model, optimizer in runs:
        set_gradients(model, seed=0)
        update(optimizer, GOOD, max_norm=1.0)

    model, optimizer = runs[0]
    before = everything(model, optimizer)
    set_gradients(model, seed=1)
    if where == "gradient":
        model.blocks[1].mlp.down.weight.grad[0, 3] = bad
    loss = torch.tensor(bad) if where == "loss" else GOOD
    _, refused = update(optimizer, loss, max_norm=1.0)
    assert refused == 1
    for now, then in zip(everything(model, optimizer), before, strict=True):
        assert torch.equal(now, then)

    for model, optimizer in runs:
        set_gradients(model, seed=2)
        _, refused = update(optimizer, GOOD, max_norm=1.0)
        assert refused == 0
    for now, wanted in zip(everything(*runs[0]), everything(*runs[1]), strict=True):
        assert torch.equal(now, wanted)
