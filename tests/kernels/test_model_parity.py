"""The model on each set of operators, compared with plain PyTorch and a float64 reference LLaMA."""

from contextlib import AbstractContextManager
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fastllama.config import ModelConfig
from fastllama.model.kv_cache import KVCache
from fastllama.model.llama import Llama
from fastllama.model.reference import ReferenceLlama
from fastllama_kernels import CPU, REFERENCE, TRITON, Operators
from tests.compare import DEVICE, assert_as_exact_as, randn
from tests.kernels.operator_cases import set_chunk_length
from tests.kernels.small_model import (
    GROUPED,
    MULTI_HEAD,
    TIED,
    WIDE_HEADS,
    random_tokens,
    small_model,
)

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
BATCH = (2, 4)
"""B and T; the interpreter takes milliseconds per token."""

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Kind = Literal["logits", "loss"]


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Gradients of the weights that require one, for a random upstream gradient."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    upstream = randn(*output.shape, seed=0, dtype=BFLOAT16).to(output.dtype)
    results = torch.autograd.grad(output, list(trained.values()), upstream)
    return dict(zip(trained, results, strict=True))


def assert_model_as_exact_as_plain(
    config: ModelConfig, dtype: torch.dtype, kind: Kind, operators: Operators = TRITON
) -> None:
    """Hold output and gradients to the comparator; the truth is `ReferenceLlama`."""
    tokens, targets = random_tokens(config, 2, *BATCH)
    models = [small_model(config, each, dtype) for each in (operators, REFERENCE)]
    truth = ReferenceLlama(config).to(DEVICE).double()
    truth.load_packed(dict(models[0].named_parameters()))
    if kind == "loss":
        outputs = [*(model(tokens, targets) for model in models), truth.loss(tokens, targets)]
    else:
        outputs = [*(model(tokens) for model in models), truth(tokens)]
    # The error of one number, the loss, can be 0 by luck, so its eps is that of the compute dtype.
    assert_as_exact_as(*(x.detach().to(dtype) for x in outputs[:2]), outputs[2].detach())

    actual, plain = (gradients(*pair) for pair in zip(models, outputs[:2], strict=True))
    apart = gradients(truth, outputs[2])
    exact = {
        name: torch.cat([apart[part] for part in parts])
        for name, parts in truth.packed_names().items()
    }
    assert actual.keys() == exact.keys()
    for name, gradient in actual.items():
        assert_as_exact_as(gradient, plain[name], exact[name])


@pytest.mark.parametrize("kind", ["logits", "loss"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    "config",
    [MULTI_HEAD, GROUPED, TIED, WIDE_HEADS],
    ids=["multi-head", "grouped", "tied", "wide heads"],
)
@pytest.mark.parametrize("operators", [TRITON, CPU], ids=lambda operators: operators.name)
def test_output_and_gradients(
    operators: Operators, config: ModelConfig, dtype: torch.dtype, kind: Kind
) -> None:
    assert_model_as_exact_as_plain(config, dtype, kind, operators)


def test_loss_chunks_that_do_not_divide_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk_length(3, monkeypatch)
    assert_model_as_exact_as_plain(MULTI_HEAD, FLOAT32, "loss")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_decoding_matches_the_full_forward(
    context: type[AbstractContextManager[None]],
) -> None:
    tokens, cache = random_tokens(GROUPED, 2, 6), KVCache(GROUPED.n_layers, 6)
    models = [small_model(GROUPED, operators) for operators in (TRITON, REFERENCE)]
    truth = small_model(GROUPED, REFERENCE, exact=True)
    with context():
        decoded = [models[0](piece, cache=cache) for piece in tokens.split([4, 1, 1], dim=1)]
        assert_as_exact_as(torch.cat(decoded, dim=1), models[1](tokens), truth(tokens))


def test_autocast() -> None:
    tokens, targets = random_tokens(GROUPED, 2, *BATCH)

    def loss(model: Llama) -> Tensor:
        # Two forwards, because autocast caches its casts of the weights.
        first, second = (model(x[None], y[None]) for x, y in zip(tokens, targets, strict=True))
        return first + second

    models = [small_model(GROUPED, operators) for operators in (TRITON, REFERENCE)]
    with torch.autocast(DEVICE, BFLOAT16):
        losses = [loss(model) for model in models]
    actual, plain = (gradients(*pair) for pair in zip(models, losses, strict=True))
    truth = small_model(GROUPED, REFERENCE, exact=True)
    exact = gradients(truth, loss(truth))
    for name, gradient in actual.items():
        # The gradients are float32 but have the precision of the autocast dtype.
        both = (x.to(BFLOAT16) for x in (gradient, plain[name]))
        assert_as_exact_as(*both, exact[name])


def test_frozen_weights_change_no_other_gradient() -> None:
    tokens, targets = random_tokens(MULTI_HEAD, 2, *BATCH)
    model = small_model(MULTI_HEAD, TRITON)
    expected = gradients(model, model(tokens, targets))
    for name in ("embedding", "blocks.0.attention.qkv", "blocks.1.mlp.norm", "output"):
        model.get_submodule(name).requires_grad_(False)
        del expected[f"{name}.weight"]
    model.blocks[1].mlp.requires_grad_(False)
    results = gradients(model, model(tokens, targets))
    assert 0 < len(results) < len(expected)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in results.items())
