"""A LLaMA small enough for Triton's interpreter, with widths that no block size divides."""

import dataclasses

import torch
from torch import Tensor

from fastllama.config import ModelConfig
from fastllama.model.llama import Llama
from fastllama_kernels import Operators
from tests.compare import DEVICE, randn

# About the mean square of the first activations, so that an eps in the wrong place shows.
MULTI_HEAD = ModelConfig(
    vocab_size=53,
    n_embd=36,
    n_layers=2,
    n_heads=3,
    multiple_of=10,
    max_seq_len=8,
    theta=100.0,
    eps=1e-3,
)
GROUPED = dataclasses.replace(MULTI_HEAD, n_heads=6, n_kv_heads=2)
TIED = dataclasses.replace(GROUPED, tied_embeddings=True)
WIDE_HEADS = dataclasses.replace(GROUPED, n_heads=4, head_dim=14, ffn_hidden=22)


def small_model(
    config: ModelConfig,
    operators: Operators,
    dtype: torch.dtype = torch.float32,
    *,
    exact: bool = False,
) -> Llama:
    """The same weights for all operators, rounded to `dtype`; `exact` then widens to float64."""
    with torch.device(DEVICE):
        model = Llama(config, operators)
    model.init_weights(seed=0)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("norm.weight"):
            # With weights of 1, swapped norms would go unnoticed.
            parameter.data += randn(config.n_embd, seed=seed, dtype=torch.float32) / 10
        # `model.to` would round the rotary tables too.
        parameter.data = parameter.data.to(dtype)
    return model.double() if exact else model


def random_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator).to(DEVICE)


def loss_and_gradients(
    model: Llama, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None
) -> dict[str, Tensor]:
    """Loss and gradients of a training step, by name; the model has no gradients afterwards."""
    loss = model(tokens, targets, cu_seqlens=cu_seqlens)
    loss.backward()
    results = {"loss": loss.detach()}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            results[name] = weight.grad
    model.zero_grad()
    return results
