import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllama.cli import main
from fastllama.config import ModelConfig
from fastllama.data.tokenizer import train_tokenizer
from fastllama.inference.generate import (
    generate_text,
    generate_tokens,
    load_run,
    sample_token,
)
from fastllama.inference.sampling import Sampling
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE
from tests.compare import randn
from tests.workspace import Workspace

V = 12
END = 1
# 256 bytes and 4 special tokens, no merges: every byte is a token of its own.
TOKENIZER = train_tokenizer([], vocab_size=260)
LOGITS = 2 * randn(V, seed=0, dtype=torch.float32, device="cpu")


def draws(sampling: Sampling, n: int = 200, logits: Tensor = LOGITS) -> list[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    return [int(sample_token(logits, sampling, generator)) for _ in range(n)]


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
def test_the_narrowest_choice_is_the_most_likely(sampling: Sampling) -> None:
    assert set(draws(sampling)) == {int(LOGITS.argmax())}


@pytest.mark.parametrize("k", [2, 5, V, V + 1])
def test_draws_all_of_the_top_k_and_no_other(k: int) -> None:
    flat = LOGITS / 10
    likeliest = flat.argsort(descending=True)[:k].tolist()
    assert set(draws(Sampling(top_k=k, temperature=1.0), 500, flat)) == set(likeliest)


def test_top_k_keeps_no_more_when_they_are_tied() -> None:
    # Not rare: bfloat16 logits have 8 bits each.
    tied = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert len(set(draws(Sampling(top_k=2), logits=tied))) == 2


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    kept = {0.39: {1}, 0.41: {1, 2}, 0.69: {1, 2}, 0.71: {1, 2, 3}, 1.0: {0, 1, 2, 3}}
    for top_p, tokens in kept.items():
        assert set(draws(Sampling(top_p=top_p, temperature=1.0), logits=logits)) == tokens


def test_top_p_counts_after_top_k() -> None:
    # Of the two tokens top-k leaves, the first alone has 4/7 of the probability.
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    assert set(draws(Sampling(top_k=2, top_p=0.5, temperature=1.0), logits=logits)) == {1}


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    n = 4000
    counts = torch.bincount(torch.tensor(draws(Sampling(temperature=temperature), n)), minlength=V)
    expected = (LOGITS.double() / temperature).softmax(0)
    # Four deviations of a binomial count, and a token for the rarest.
    bound = 4 * (n * expected * (1 - expected)).sqrt() + 1
    assert ((counts - n * expected).abs() <= bound).all()


def test_no_length_of_a_text_reaches_cudnn(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, sdpa = tmp_path / "run", F.scaled_dot_product_attention
    main(["train", str(workspace.recipe), "--run-dir", str(run)])
    lengths = []

    def remember(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        lengths.append((query.shape[2], key.shape[2]))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        return sdpa(query, key, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", remember)
    loaded = load_run(run, torch.device("cpu"))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    list(generate_tokens(loaded.model, [5, 6, 7], Sampling(3, temperature=0), end_token=-1))
    # Of two layers.
    assert lengths[::2] == lengths[1::2] == [(3, 3), (1, 4), (1, 5)]


@pytest.mark.parametrize("path", ["/", "/nowhere", "nowhere"])
def test_names_what_is_no_run(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path} is not a run folder"):
        load_run(Path(path), torch.device("cpu"))


def test_the_seed_decides_the_text(model: Llama) -> None:
    def text(seed: int) -> list[int]:
        sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=seed)
        return list(generate_tokens(model, [5, 6], sampling, end_token=END))

    assert text(0) == text(0)
    assert text(0) != text(1)


def test_continues_as_the_model_without_a_cache_would(model: Llama) -> None:
    tokens = [5, 6, 7]
    generated = list(generate_tokens(model, tokens, Sampling(8, temperature=0), end_token=-1))
    for token in generated:
        assert token == model(torch.tensor([tokens]))[0, -1].argmax()
        tokens = [*tokens, token]
    assert len(generated) == 8


def test_stops_at_the_end_token(model: Llama) -> None:
    def greedy(end_token: int) -> list[int]:
        return list(generate_tokens(model, [5, 6], Sampling(10, temperature=0), end_token))

    free = greedy(end_token=-1)
    assert greedy(end_token=free[3]) == free[: free.index(free[3])]


def test_stops_at_the_end_of_the_context(model: Llama) -> None:
    sampling = Sampling(max_new_tokens=100, temperature=0)
    assert len(list(generate_tokens(model, [5] * 13, sampling, end_token=-1))) == 3
    with pytest.raises(ValueError, match="The prompt has 16 tokens and the model's context is 16;"):
        next(generate_tokens(model, [5] * 16, sampling, end_token=-1))


def pieces_of(ids: list[int], model: Llama, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is shown when the model draws these tokens."""
    monkeypatch.setattr("fastllama.inference.generate.generate_tokens", lambda *_: iter(ids))
    return [piece for piece in generate_text(model, TOKENIZER, "", Sampling(), END) if piece]


def test_pieces_are_whole_characters(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "naïve 日本 🦙!"
    assert pieces_of(TOKENIZER.encode(text).ids, model, monkeypatch) == list(text)


@pytest.mark.parametrize("text", ["日本 🦙", "a broken \ufffd of its own\ufffd"])
def test_nothing_is_lost_at_a_cut(model: Llama, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    for end in range(len(ids) + 1):
        shown = "".join(pieces_of(ids[:end], model, monkeypatch))
        assert shown == TOKENIZER.decode(ids[:end], skip_special_tokens=False)


def test_an_empty_prompt_begins_with_an_end_token(model: Llama) -> None:
    sampling = Sampling(max_new_tokens=6, temperature=0)
    ids = list(generate_tokens(model, [END], sampling, END))
    wanted = TOKENIZER.decode(ids, skip_special_tokens=False)
    assert "".join(generate_text(model, TOKENIZER, "", sampling, END)) == wanted


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_new_tokens", 0, "--max-new-tokens must be at least 1, not 0"),
        ("temperature", -0.1, "--temperature must be 0 or more, not -0.1"),
        ("temperature", float("nan"), "--temperature must be 0 or more, not nan"),
        ("temperature", float("inf"), "--temperature must be 0 or more, not inf"),
        ("top_k", 0, "--top-k must be at least 1, not 0"),
        ("top_p", 0.0, "--top-p must be greater than 0 and at most 1, not 0.0"),
        ("top_p", 1.1, "--top-p must be greater than 0 and at most 1, not 1.1"),
        ("top_p", float("nan"), "--top-p must be greater than 0 and at most 1, not nan"),
    ],
)
def test_refuses_what_no_text_can_be_drawn_with(name: str, value: Any, message: str) -> None:
    Sampling().validate()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Sampling(), **{name: value}).validate()
