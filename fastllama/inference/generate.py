"""Generates text with a trained model, one token at a time, over a key/value cache."""

from collections.abc import Callable, Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastllama.data.encoding import encode_prompt
from fastllama.errors import SideJobFailedError
from fastllama.inference.sampling import Sampling
from fastllama.inference.text_stream import TextStream
from fastllama.model.kv_cache import KVCache
from fastllama.model.llama import Llama


def sample_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw a token id from `logits` (V,): a 0-d int64 tensor on their device.

    The id is -1 if a logit is not finite.
    """
    logits_V = logits_V.float()
    # 0 times infinity or NaN is NaN.
    is_finite = (logits_V * 0).sum() == 0
    if sampling.temperature == 0:
        return torch.where(is_finite, logits_V.argmax(), -1)
    # On CUDA, multinomial over NaN would end the process.
    sorted_logits, ids = logits_V.nan_to_num().sort(descending=True, stable=True)
    sorted_logits = sorted_logits[: sampling.top_k]
    # Relative to the largest, so that no temperature overflows.
    probabilities = ((sorted_logits - sorted_logits[0]) / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        # A token stays while the tokens before it sum to less than top_p, so the first stays.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    drawn = ids[torch.multinomial(probabilities, 1, generator=generator)[0]]
    return torch.where(is_finite, drawn, -1)


def generate_tokens(
    model: Llama,
    prompt: list[int],
    sampling: Sampling,
    end_token: int,
    agree: Callable[[Tensor], Tensor] = Tensor.clone,
) -> Iterator[int]:
    """Continue `prompt`, at least one token id, up to the end token, the limit or the context.

    `agree` gives every rank the token of the main process, where ranks run a sharded model.

    Raises:
        ValueError: the prompt fills the whole context.
        SideJobFailedError: the logits are not finite, on the main process and so on every rank;
            raised when the token is asked for.
    """
    room = model.config.max_seq_len - len(prompt)
    if room < 1:
        raise ValueError(
            f"The prompt has {len(prompt)} tokens and the model's context is "
            f"{model.config.max_seq_len}; shorten the prompt."
        )
    return _tokens(model, prompt, sampling, min(sampling.max_new_tokens, room), end_token, agree)


@torch.no_grad()
def _tokens(
    model: Llama,
    prompt: list[int],
    sampling: Sampling,
    n_new: int,
    end_token: int,
    agree: Callable[[Tensor], Tensor],
) -> Iterator[int]:
    device = model.cos_PR.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    # Not the whole context: at 131,072 positions the cache of a small model is several gigabytes.
    cache = KVCache(model.config.n_layers, len(prompt) + n_new)
    tokens = prompt
    for _ in range(n_new):
        tokens_BT = torch.tensor([tokens], dtype=torch.int64, device=device)
        logits_V = model(tokens_BT, cache=cache, last_only=True)[0, -1]
        token = int(agree(sample_token(logits_V, sampling, generator)))
        if token < 0:
            raise SideJobFailedError(
                "the logits are not finite: the model has diverged (use an earlier checkpoint, or "
                "train again with a lower optimizer.max_lr)"
            )
        if token == end_token:
            return
        yield token
        tokens = [token]


def generate_text(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    end_token: int,
    agree: Callable[[Tensor], Tensor] = Tensor.clone,
    special_tokens: bool = False,
    start_token: int | None = None,
) -> Iterator[str]:
    """The text that follows `prompt`, in pieces of whole characters.

    `start_token` goes in front of the prompt, unless the prompt begins with it. Without one, a
    document starts after an end token, so an empty prompt becomes one. With `special_tokens`, the
    names of special tokens in the prompt mean these tokens; otherwise they are ordinary text.

    Raises:
        ValueError: the tokenizer cannot encode the prompt, or the prompt fills the whole context.
        SideJobFailedError: as `generate_tokens`, when the next piece is asked for.
    """
    ids = encode_prompt(tokenizer, prompt, end_token, special_tokens)
    stream = TextStream(tokenizer, ids)
    if start_token is not None and ids[:1] != [start_token]:
        ids = [start_token, *ids]
    tokens = generate_tokens(model, ids or [end_token], sampling, end_token, agree)
    return _pieces(tokens, stream)


def _pieces(tokens: Iterator[int], stream: TextStream) -> Iterator[str]:
    for token in tokens:
        yield stream.add(token)
    yield stream.finish()
