"""Packed weights decode like the weights that they replace."""

import dataclasses

import pytest
import torch

from fastllama.config import ModelConfig
from fastllama.inference.generate import generate_tokens
from fastllama.inference.packing import pack_weights
from fastllama.inference.sampling import Sampling
from fastllama.model.llama import Linear, Llama
from fastllama_kernels import REFERENCE, can_pack

CONFIG = ModelConfig(
    vocab_size=260, n_embd=48, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=8, max_seq_len=32
)

needs_onednn = pytest.mark.skipif(not can_pack(torch.empty(1, 1)), reason="PyTorch lacks oneDNN")


@needs_onednn
@pytest.mark.parametrize("tied", [False, True], ids=["separate", "tied"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_packed_model_continues_as_before(tied: bool, softcap: float | None) -> None:
    config = dataclasses.replace(CONFIG, tied_embeddings=tied, logit_softcap=softcap)
    model = Llama(config, REFERENCE).eval()
    model.init_weights(seed=0)
    prompt, sampling = [5, 6, 7, 8], Sampling(20, temperature=0)
    tokens = torch.tensor([prompt])
    logits, text = model(tokens), list(generate_tokens(model, prompt, sampling, end_token=-1))
    embedding = model.embedding.weight.clone()
    pack_weights(model)
    assert all(module.weight.is_mkldnn for module in model.modules() if isinstance(module, Linear))
    assert torch.equal(model.embedding.weight, embedding)
    with torch.inference_mode():
        packed_text = list(generate_tokens(model, prompt, sampling, end_token=-1))
        # Sums of up to 128 products in another order, through 2 layers, of logits of about 0.3.
        torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-5)
    assert packed_text == text


def test_weights_stay_where_none_can_be_packed() -> None:
    model = Llama(CONFIG, REFERENCE).double()
    before = list(model.parameters())
    pack_weights(model)
    assert all(old is new for old, new in zip(before, model.parameters(), strict=True))
