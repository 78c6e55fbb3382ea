"""A packed model continues texts like the model whose place it takes."""

import copy
import dataclasses

import pytest
import torch

from fastllama.config import ModelConfig
from fastllama.inference.generate import generate_tokens
from fastllama.inference.packing import PackedBlock, PackedNorm, pack_model
from fastllama.inference.sampling import Sampling
from fastllama.model.kv_cache import KVCache
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE, can_pack
from tests.compare import assert_as_exact_as

# The rows of the embedding are so short that eps is a tenth of their mean square.
CONFIG = ModelConfig(
    vocab_size=260,
    n_embd=48,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    multiple_of=8,
    max_seq_len=32,
    eps=4e-5,
)
TOKENS = torch.arange(5, 29).view(2, 12)

PACKED = [
    dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(torch.empty(1, 1, dtype=dtype))
]


def build(dtype: torch.dtype, config: ModelConfig = CONFIG) -> Llama:
    """A model whose weights are rounded to bfloat16, so that every dtype has the same."""
    model = Llama(config, REFERENCE).eval()
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        # Parameters only: the rotary tables stay float32.
        parameter.data = parameter.data.bfloat16().to(dtype)
    return model


def packed(model: Llama) -> Llama:
    """A packed copy of `model`."""
    model = copy.deepcopy(model)
    pack_model(model)
    assert all(isinstance(block, PackedBlock) for block in model.blocks)
    return model


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("lengths", [None, [12], [7, 1, 1, 3]], ids=str)
@torch.inference_mode()
def test_logits_are_as_exact(lengths: list[int] | None, dtype: torch.dtype) -> None:
    model, exact = build(dtype), build(torch.float64)
    if lengths is None:
        logits = packed(model)(TOKENS)
    else:
        packed_model, cache = packed(model), KVCache(model.config.n_layers, 12)
        pieces = TOKENS.split(lengths, dim=1)
        logits = torch.cat([packed_model(piece, cache=cache) for piece in pieces], dim=1)
    assert_as_exact_as(logits, model(TOKENS), exact(TOKENS))


def test_scale_of_bfloat16_rows_is_float32() -> None:
    norm = torch.nn.RMSNorm(48, eps=4e-5)
    x = torch.randn(8, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = (x.double().square().sum(-1, keepdim=True) + 48 * 4e-5).sqrt()
    # A sum of 48 squares, a root and a hypotenuse, of 2^-24 each.
    torch.testing.assert_close(PackedNorm(norm).scale(x).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@torch.inference_mode()
def test_logits_of_the_last_position(dtype: torch.dtype) -> None:
    model, exact = build(dtype), build(torch.float64)
    last = packed(model)(TOKENS, cache=KVCache(model.config.n_layers, 12), last_only=True)
    assert_as_exact_as(last, model(TOKENS)[:, -1:], exact(TOKENS)[:, -1:])


@pytest.mark.parametrize("tied", [False, True], ids=["separate", "tied"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.skipif(not PACKED, reason="PyTorch lacks oneDNN")
def test_packed_model_continues_as_before(tied: bool, softcap: float | None) -> None:
    config = dataclasses.replace(CONFIG, tied_embeddings=tied, logit_softcap=softcap)
    model = build(torch.float32, config)
    prompt, sampling = [5, 6, 7, 8], Sampling(20, temperature=0)
    text = list(generate_tokens(model, prompt, sampling, end_token=-1))
    packed_model = packed(model)
    assert torch.equal(packed_model.embedding.weight, model.embedding.weight)
    with torch.inference_mode():
        packed_text = list(generate_tokens(packed_model, prompt, sampling, end_token=-1))
        # Sums of up to 128 products in another order, through 2 layers, of logits of about 0.3.
        torch.testing.assert_close(packed_model(TOKENS), model(TOKENS), rtol=0, atol=1e-5)
    assert packed_text == text


def test_a_model_stays_where_its_weights_cannot_be_packed() -> None:
    model = build(torch.float64)
    before = list(model.modules())
    pack_model(model)
    assert all(old is new for old, new in zip(before, model.modules(), strict=True))
