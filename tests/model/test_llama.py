"""The trained model against the reference model; initial weights, cache, dropout, loss options."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastllama.config import ModelConfig, OptimizerConfig, load_recipe
from fastllama.model.kv_cache import KVCache
from fastllama.model.llama import Llama
from fastllama.model.reference import ReferenceLlama
from fastllama.optim.adamw import build_optimizer
from fastllama.optim.clipping import update
from fastllama_kernels import REFERENCE
from tests.compare import randn

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))

# eps is as large as the activations, so that an eps in the wrong place shows.
SMALL = ModelConfig(
    vocab_size=50,
    n_embd=64,
    n_layers=3,
    n_heads=4,
    multiple_of=32,
    max_seq_len=24,
    theta=100.0,
    eps=1e-2,
)
GROUPED = dataclasses.replace(SMALL, n_kv_heads=2)
# The 8 frequencies cover all three cases: unchanged, divided and interpolated.
SCALED = dataclasses.replace(
    SMALL, rope_scaling_factor=8.0, rope_original_max_seq_len=64, rope_high_freq_factor=4.0
)
CONFIGS = {
    "multi-head": SMALL,
    "grouped": GROUPED,
    "tied": dataclasses.replace(SMALL, tied_embeddings=True),
    "scaled rope": SCALED,
    "wide heads": dataclasses.replace(GROUPED, head_dim=24, ffn_hidden=50),
    "narrow heads": dataclasses.replace(GROUPED, n_heads=6, head_dim=8),
    # As large as the first logits, so that it changes them.
    "softcap": dataclasses.replace(SMALL, logit_softcap=0.5),
}


def build(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Llama:
    model = Llama(config, REFERENCE)
    model.init_weights(seed=0)
    model.to(dtype).init_rotary()
    return model


def random_tokens(config: ModelConfig, *shape: int) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def gradients_by_name(model: nn.Module, output: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(output, parameters, upstream), strict=True))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_agrees_with_the_reference_model(config: ModelConfig) -> None:
    model, reference = build(config), ReferenceLlama(config).double()
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(parameters.items()):
            # With all ones, swapped norms would not show.
            if "norm" in name:
                parameter.copy_(1 + 0.1 * randn(config.n_embd, seed=seed, device="cpu"))
    reference.load_packed(parameters)
    tokens, targets = random_tokens(config, 2, 2, config.max_seq_len)

    logits, expected = model(tokens), reference(tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    loss = model(tokens, targets)
    torch.testing.assert_close(loss, reference.loss(tokens, targets), rtol=0, atol=1e-10)

    upstream = randn(*logits.shape, seed=0, device="cpu")
    gradients = gradients_by_name(model, logits, upstream)
    separate = gradients_by_name(reference, expected, upstream)
    packed = {
        name: torch.cat([separate[part] for part in parts])
        for name, parts in reference.packed_names().items()
    }
    assert gradients.keys() == packed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, packed[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_first_loss_of_recipes_is_near_ln_vocab_size(recipe: Path) -> None:
    config = load_recipe(recipe).model
    # Standard deviations are set per fan-in, so depth, feed-forward width and vocabulary can be
    # reduced until the largest recipe fits in 1 GB.
    config = dataclasses.replace(
        config,
        n_layers=2,
        vocab_size=min(config.vocab_size, 2**25 // config.n_embd),
        ffn_multiplier=min(config.ffn_multiplier, 1024 / config.n_embd),
    )
    model = Llama(config, REFERENCE)
    model.init_weights(seed=0)
    tokens, targets = random_tokens(config, 2, 1, 128)
    with torch.no_grad():
        loss = model(tokens, targets).item()
    # Logits of standard deviation 1/4 add 1/32. The mean over 128 tokens has standard deviation
    # 1/4 / 128^1/2 = 0.02.
    assert loss == pytest.approx(math.log(config.vocab_size), abs=0.1)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    first, second = Llama(SMALL, REFERENCE), Llama(GROUPED, REFERENCE)
    torch.manual_seed(1)
    first.init_weights(seed=0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second.init_weights(seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    first_weights, second_weights = dict(first.named_parameters()), dict(second.named_parameters())
    for name, weight in first_weights.items():
        # The two models differ in the shape of qkv.
        if "qkv" not in name:
            assert torch.equal(weight, second_weights[name])
    matrices = [weight for weight in first_weights.values() if weight.ndim == 2]
    assert len({weight.flatten()[0].item() for weight in matrices}) == len(matrices)
    second.init_weights(seed=1)
    embedding = "embedding.weight"
    assert not torch.equal(first_weights[embedding], second_weights[embedding])


def test_initial_standard_deviations() -> None:
    config = dataclasses.replace(SMALL, n_embd=128, n_layers=2, vocab_size=256)
    parameters = dict(build(config).named_parameters())
    residual = 1 / math.sqrt(2 * config.n_layers)
    expected = {
        "embedding": 0.02,
        "output": 128**-0.5 / 4,
        "blocks.1.attention.qkv": 128**-0.5,
        "blocks.1.attention.output": 128**-0.5 * residual,
        "blocks.1.mlp.gate_up": 128**-0.5,
        "blocks.1.mlp.down": config.ffn_width**-0.5 * residual,
    }
    # The standard deviation of 2^14 values has a relative standard error of 2^-7.5. The tolerance
    # is 3 standard errors.
    actual = {name: parameters[f"{name}.weight"].std().item() for name in expected}
    assert actual == pytest.approx(expected, rel=0.017)
    assert all((weight == 1).all() for name, weight in parameters.items() if "norm" in name)


@pytest.mark.parametrize("lengths", [[1] * 24, [10, 1, 5, 1, 7]], ids=["one by one", "in pieces"])
def test_cache_gives_the_same_logits(lengths: list[int]) -> None:
    model, tokens = build(GROUPED), random_tokens(GROUPED, 2, 24)
    cache = KVCache(model.config.n_layers, 24)
    logits = [model(piece, cache=cache) for piece in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens), rtol=0, atol=1e-12)


def test_logits_of_the_last_position_only() -> None:
    model, tokens = build(GROUPED), random_tokens(GROUPED, 2, 24)
    last = model(tokens, cache=KVCache(model.config.n_layers, 24), last_only=True)
    assert last.shape == (2, 1, GROUPED.vocab_size)
    torch.testing.assert_close(last, model(tokens)[:, -1:], rtol=0, atol=1e-12)


def test_model_is_causal() -> None:
    model, tokens = build(GROUPED), random_tokens(GROUPED, 1, 24)
    before = model(tokens)
    tokens[0, 13] += 1
    changed = (model(tokens) != before).any(dim=-1)[0]
    assert changed.tolist() == [False] * 13 + [True] * 11


def test_dropout_in_training_mode_only() -> None:
    tokens = random_tokens(SMALL, 1, 24)
    plain, with_dropout = build(SMALL), build(dataclasses.replace(SMALL, dropout=0.5))
    expected = plain(tokens)
    assert not torch.allclose(with_dropout(tokens), expected)
    assert torch.equal(with_dropout.eval()(tokens), expected)
    assert torch.equal(plain.eval()(tokens), expected)


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_z_loss_and_label_smoothing_in_training_mode_only(softcap: float | None) -> None:
    config = dataclasses.replace(GROUPED, logit_softcap=softcap)
    plain = build(config)
    model = Llama(config, REFERENCE, z_loss=0.1, label_smoothing=0.2).double()
    model.load_state_dict(plain.state_dict())
    model.init_rotary()
    tokens, targets = random_tokens(config, 2, 2, config.max_seq_len)
    logits = plain(tokens)
    log_z = logits.logsumexp(-1)
    nll = log_z.mean() - logits.gather(-1, targets[..., None]).mean()
    # The cross entropy with the uniform distribution.
    uniform = (log_z - logits.mean(-1)).mean()
    expected = 0.8 * nll + 0.2 * uniform + 0.1 * log_z.square().mean()
    torch.testing.assert_close(model(tokens, targets), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.eval()(tokens, targets), nll, rtol=0, atol=1e-12)


def test_overfits_one_batch() -> None:
    config = dataclasses.replace(GROUPED, n_layers=2, eps=1e-5, max_seq_len=64)
    model = build(config, torch.float32)
    optimizer = build_optimizer(model, OptimizerConfig(max_lr=3e-3))
    tokens, targets = random_tokens(config, 2, 1, 64)
    for _ in range(200):
        loss = model(tokens, targets)
        loss.backward()
        update(optimizer, loss.detach(), max_norm=1.0)
    assert loss.item() < 0.05
