"""Sampling, and generation with a key/value cache."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllama.config import ModelConfig
from fastllama.data.tokenizer import train_tokenizer
from fastllama.inference import generate
from fastllama.inference.generate import generate_text, generate_tokens, sample_token
from fastllama.inference.load import load_run
from fastllama.inference.sampling import Sampling
from fastllama.model.kv_cache import KVCache
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE
from tests.compare import randn
from tests.runs import train
from tests.workspace import Workspace

V = 12
END = 1
# 256 bytes and 4 special tokens, without merges: every byte is a token.
TOKENIZER = train_tokenizer([], vocab_size=260)
LOGITS_V = 2 * randn(V, seed=0, dtype=torch.float32, device="cpu")


def draw(sampling: Sampling, n: int = 200, logits_V: Tensor = LOGITS_V) -> list[int]:
    """Draw `n` token ids."""
    generator = torch.Generator().manual_seed(sampling.seed)
    return [int(sample_token(logits_V, sampling, generator)) for _ in range(n)]


@pytest.fixture(scope="module")
def model() -> Llama:
    config = ModelConfig(
        vocab_size=260, n_embd=16, n_layers=2, n_heads=2, multiple_of=16, max_seq_len=16
    )
    model = Llama(config, REFERENCE)
    model.init_weights(seed=0)
    return model.eval()


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=1e-6)]
)
def test_narrow_options_give_the_most_likely_token(sampling: Sampling) -> None:
    assert set(draw(sampling)) == {int(LOGITS_V.argmax())}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_no_token(temperature: float) -> None:
    sampling = Sampling(temperature=temperature)
    largest = torch.finfo(torch.float32).max
    for value in (float("nan"), float("inf"), -float("inf"), largest, -largest):
        logits_V = LOGITS_V.clone()
        logits_V[V // 2 :] = value
        is_finite = abs(value) <= largest
        assert (set(draw(sampling, 3, logits_V)) == {-1}) != is_finite


@pytest.mark.parametrize("k", [2, 5, V, V + 1])
def test_top_k(k: int) -> None:
    # Flat enough that 500 draws give every token.
    flat_V = LOGITS_V / 10
    most_likely = flat_V.argsort(descending=True)[:k].tolist()
    assert set(draw(Sampling(top_k=k, temperature=1.0), 500, flat_V)) == set(most_likely)


def test_top_k_with_ties() -> None:
    # Ties are common: a bfloat16 logit has 8 significant bits.
    tied_V = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert len(set(draw(Sampling(top_k=2), logits_V=tied_V))) == 2


def test_top_p() -> None:
    logits_V = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    kept = {0.39: {1}, 0.41: {1, 2}, 0.69: {1, 2}, 0.71: {1, 2, 3}, 1.0: {0, 1, 2, 3}}
    for top_p, tokens in kept.items():
        assert set(draw(Sampling(top_p=top_p, temperature=1.0), logits_V=logits_V)) == tokens


def test_top_p_applies_after_top_k() -> None:
    # top_k leaves two tokens. The first has 4/7 of their probability.
    logits_V = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    assert set(draw(Sampling(top_k=2, top_p=0.5, temperature=1.0), logits_V=logits_V)) == {1}


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_frequencies_match_the_softmax(temperature: float) -> None:
    n = 4000
    counts = torch.bincount(torch.tensor(draw(Sampling(temperature=temperature), n)), minlength=V)
    expected = (LOGITS_V.double() / temperature).softmax(0)
    # Four standard deviations of a binomial count, plus 1 for counts near 0.
    bound = 4 * (n * expected * (1 - expected)).sqrt() + 1
    assert ((counts - n * expected).abs() <= bound).all()


def test_prompt_at_once_and_then_one_query_at_a_time(
    model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdpa, lengths = F.scaled_dot_product_attention, []

    def recording_sdpa(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        lengths.append((query.shape[2], key.shape[2]))
        return sdpa(query, key, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording_sdpa)
    list(generate_tokens(model, [5, 6, 7], Sampling(3, temperature=0), end_token=-1))
    # The prompt at once, of which the last layer needs one query; then one at a time to all keys.
    assert lengths[::2] == [(3, 3), (1, 4), (1, 5)]
    assert lengths[1::2] == [(1, 3), (1, 4), (1, 5)]


def test_generation_applies_the_softcap_of_the_run(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run, "--model.logit-softcap", 20)
    model = load_run(run, torch.device("cpu")).model
    sampled_from: list[Tensor] = []

    def recording_sample_token(logits_V: Tensor, *rest: Any) -> Tensor:
        sampled_from.append(logits_V)
        return sample_token(logits_V, *rest)

    monkeypatch.setattr("fastllama.inference.generate.sample_token", recording_sample_token)
    with torch.no_grad():
        # Ten updates give small logits. Scaled, many of them exceed 20.
        model.output.weight *= 100
        prompt = [5, 6, 7]
        new = list(generate_tokens(model, prompt, Sampling(4, temperature=0), end_token=-1))
        model.output.softcap = None
        unbounded = model(torch.tensor([prompt + new[:-1]]))[0, len(prompt) - 1 :]
    bounded = torch.stack(sampled_from)
    assert bounded.shape == unbounded.shape == (4, 320)
    assert (unbounded.abs() > 20).float().mean() > 0.5
    assert bounded.abs().max() <= 20
    # The cache sums attention in another order: a few float32 roundings of logits of some hundred.
    expected = 20 * torch.tanh(unbounded / 20)
    torch.testing.assert_close(bounded, expected, rtol=0, atol=2e-3)


def test_seed_determines_the_text(model: Llama) -> None:
    def generate(seed: int) -> list[int]:
        sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=seed)
        return list(generate_tokens(model, [5, 6], sampling, end_token=END))

    assert generate(0) == generate(0)
    assert generate(0) != generate(1)


def test_cached_generation_agrees_with_the_model_without_a_cache(model: Llama) -> None:
    tokens = [5, 6, 7]
    generated = list(generate_tokens(model, tokens, Sampling(8, temperature=0), end_token=-1))
    for token in generated:
        assert token == model(torch.tensor([tokens]))[0, -1].argmax()
        tokens = [*tokens, token]
    assert len(generated) == 8


def test_cache_is_as_long_as_the_text(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    # Models that others trained have contexts of 131,072 positions.
    allocated = []
    monkeypatch.setattr(
        generate, "KVCache", lambda n_layers, n: allocated.append(n) or KVCache(n_layers, n)
    )
    for n_new in (4, 1000):
        list(generate_tokens(model, [5, 9], Sampling(n_new), end_token=-1))
    assert allocated == [2 + 4, model.config.max_seq_len]


def test_stops_at_the_end_token(model: Llama) -> None:
    def greedy(end_token: int) -> list[int]:
        return list(generate_tokens(model, [5, 6], Sampling(10, temperature=0), end_token))

    without_end = greedy(end_token=-1)
    end_token = without_end[3]
    assert greedy(end_token) == without_end[: without_end.index(end_token)]


def test_stops_when_the_context_is_full(model: Llama) -> None:
    sampling = Sampling(max_new_tokens=100, temperature=0)
    assert len(list(generate_tokens(model, [5] * 13, sampling, end_token=-1))) == 3
    with pytest.raises(ValueError, match="The prompt has 16 tokens and the model's context is 16;"):
        generate_tokens(model, [5] * 16, sampling, end_token=-1)


def text_pieces(ids: list[int], model: Llama, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The nonempty pieces of text that `generate_text` yields for these new token ids."""
    monkeypatch.setattr("fastllama.inference.generate.generate_tokens", lambda *_: iter(ids))
    return [piece for piece in generate_text(model, TOKENIZER, "", Sampling(), END) if piece]


def test_pieces_are_whole_characters(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "naïve 日本 🦙!"
    assert text_pieces(TOKENIZER.encode(text).ids, model, monkeypatch) == list(text)


@pytest.mark.parametrize("text", ["日本 🦙", "a broken \ufffd of its own\ufffd"])
def test_pieces_join_to_the_decoded_text(
    model: Llama, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    ids = TOKENIZER.encode(text).ids
    # Every length, so that generation also ends inside characters.
    for end in range(len(ids) + 1):
        joined = "".join(text_pieces(ids[:end], model, monkeypatch))
        assert joined == TOKENIZER.decode(ids[:end], skip_special_tokens=False)


def test_empty_prompt_is_an_end_token(model: Llama) -> None:
    sampling = Sampling(max_new_tokens=6, temperature=0)
    ids = list(generate_tokens(model, [END], sampling, END))
    expected = TOKENIZER.decode(ids, skip_special_tokens=False)
    assert "".join(generate_text(model, TOKENIZER, "", sampling, END)) == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_new_tokens", 0, "--max-new-tokens must be at least 1, not 0"),
        ("temperature", -0.1, "--temperature must be 0 or more and finite, not -0.1"),
        ("temperature", float("nan"), "--temperature must be 0 or more and finite, not nan"),
        ("temperature", float("inf"), "--temperature must be 0 or more and finite, not inf"),
        ("top_k", 0, "--top-k must be at least 1, not 0"),
        ("top_p", 0.0, "--top-p must be greater than 0 and at most 1, not 0.0"),
        ("top_p", 1.1, "--top-p must be greater than 0 and at most 1, not 1.1"),
        ("top_p", float("nan"), "--top-p must be greater than 0 and at most 1, not nan"),
    ],
)
def test_sampling_options_out_of_range(name: str, value: Any, message: str) -> None:
    Sampling().validate()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Sampling(), **{name: value}).validate()
