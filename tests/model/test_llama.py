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
from fastllama.optim.adamw import build_optimizer, update
from fastllama_kernels import REFERENCE
from tests.compare import randn

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))

# eps is of the size of the activations, so that one in the wrong place shows.
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
# With these, of the 8 frequencies some are kept, some divided and some interpolated.
SCALED = dataclasses.replace(
    SMALL, rope_scaling_factor=8.0, rope_original_max_seq_len=64, rope_high_freq_factor=4.0
)
CONFIGS = {
    "multi-head": SMALL,
    "grouped": GROUPED,
    "tied": dataclasses.replace(SMALL, tied_embeddings=True),
    "scaled rope": SCALED,
    # Of the size of the first logits, so that it bends them.
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
            # All ones would hide a norm taken for another.
            if "norm" in name:
                parameter.copy_(1 + 0.1 * randn(config.n_embd, seed=seed, device="cpu"))
    reference.load_packed(parameters)
    tokens, targets = random_tokens(config, 2, 2, config.max_seq_len)

    logits, wanted = model(tokens), reference(tokens)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-10)
    loss = model(tokens, targets)
    torch.testing.assert_close(loss, reference.loss(tokens, targets), rtol=0, atol=1e-10)

    upstream = randn(*logits.shape, seed=0, device="cpu")
    gradients = gradients_by_name(model, logits, upstream)
    apart = gradients_by_name(reference, wanted, upstream)
    packed = {
        name: torch.cat([apart[part] for part in parts])
        for name, parts in reference.packed_names().items()
    }
    assert gradients.keys() == packed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, packed[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_first_loss_of_a_recipe_is_that_of_guessing(recipe: Path) -> None:
    config = load_recipe(recipe).model
    # Deviations are set per fan-in, so depth, feed-forward width and the length of the vocabulary
    # can be cut until the largest recipe fits in 1 GB.
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
    # The logits' deviation of 1/4 costs 1/32; the mean over 128 tokens wanders by 1/4 / 128^1/2.
    assert loss == pytest.approx(math.log(config.vocab_size), abs=0.1)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    first, second = Llama(SMALL, REFERENCE), Llama(GROUPED, REFERENCE)
    torch.manual_seed(1)
    first.init_weights(seed=0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second.init_weights(seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    for name, weight in ours.items():
        if "qkv" not in name:
            assert torch.equal(weight, theirs[name])
    matrices = [weight for weight in ours.values() if weight.ndim == 2]
    assert len({weight.flatten()[0].item() for weight in matrices}) == len(matrices)
    second.init_weights(seed=1)
    assert not torch.equal(ours["embedding.weight"], theirs["embedding.weight"])


def test_initial_deviations_are_those_of_the_table() -> None:
    config = dataclasses.replace(SMALL, n_embd=128, n_layers=2, vocab_size=256)
    parameters = dict(build(config).named_parameters())
    residual = 1 / math.sqrt(2 * config.n_layers)
    wanted = {
        "embedding": 0.02,
        "output": 128**-0.5 / 4,
        "blocks.1.attention.qkv": 128**-0.5,
        "blocks.1.attention.output": 128**-0.5 * residual,
        "blocks.1.mlp.gate_up": 128**-0.5,
        "blocks.1.mlp.down": config.ffn_hidden**-0.5 * residual,
    }
    # A sample deviation of 2^14 values and more is off by 1/2^7.5 of itself: 3 times that.
    actual = {name: parameters[f"{name}.weight"].std().item() for name in wanted}
    assert actual == pytest.approx(wanted, rel=0.017)
    assert all((weight == 1).all() for name, weight in parameters.items() if "norm" in name)


@pytest.mark.parametrize("pieces", [[1] * 24, [10, 1, 5, 1, 7]], ids=["one by one", "in pieces"])
def test_cache_changes_nothing(pieces: list[int]) -> None:
    model, tokens = build(GROUPED), random_tokens(GROUPED, 2, 24)
    cache = KVCache(GROUPED)
    logits = [model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens), rtol=0, atol=1e-12)


def test_a_token_changes_no_earlier_logits() -> None:
    model, tokens = build(GROUPED), random_tokens(GROUPED, 1, 24)
    before = model(tokens)
    tokens[0, 13] += 1
    changed = (model(tokens) != before).any(dim=-1)[0]
    assert changed.tolist() == [False] * 13 + [True] * 11


def test_dropout_acts_in_training_alone() -> None:
    tokens = random_tokens(SMALL, 1, 24)
    plain, dropping = build(SMALL), build(dataclasses.replace(SMALL, dropout=0.5))
    wanted = plain(tokens)
    assert not torch.allclose(dropping(tokens), wanted)
    assert torch.equal(dropping.eval()(tokens), wanted)
    assert torch.equal(plain.eval()(tokens), wanted)


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_z_loss_and_label_smoothing_are_part_of_the_training_loss_only(
    softcap: float | None,
) -> None:
    config = dataclasses.replace(GROUPED, logit_softcap=softcap)
    plain = build(config)
    model = Llama(config, REFERENCE, z_loss=0.1, label_smoothing=0.2).double()
    model.load_state_dict(plain.state_dict())
    model.init_rotary()
    tokens, targets = random_tokens(config, 2, 2, config.max_seq_len)
    logits = plain(tokens)
    log_z = logits.logsumexp(-1)
    likelihood = log_z.mean() - logits.gather(-1, targets[..., None]).mean()
    uniform = (log_z - logits.mean(-1)).mean()
    wanted = 0.8 * likelihood + 0.2 * uniform + 0.1 * log_z.square().mean()
    torch.testing.assert_close(model(tokens, targets), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.eval()(tokens, targets), likelihood, rtol=0, atol=1e-12)


def test_learns_a_batch_by_heart() -> None:
    config = dataclasses.replace(GROUPED, n_layers=2, eps=1e-5, max_seq_len=64)
    model = build(config, torch.float32)
    optimizer = build_optimizer(model, OptimizerConfig(max_lr=3e-3))
    tokens, targets = random_tokens(config, 2, 1, 64)
    for _ in range(200):
        loss = model(tokens, targets)
        loss.backward()
        update(optimizer, loss.detach(), max_norm=1.0)
    assert loss.item() < 0.05
