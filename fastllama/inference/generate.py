"""Generates text with a trained model, one token at a time, over a key/value cache."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastllama.checkpoints.reading import (
    find_damage,
    find_difference,
    load_tensors,
    newest_checkpoint,
    read_identity,
)
from fastllama.checkpoints.state import MODEL, model_tensors
from fastllama.data.tokenizer import load_tokenizer
from fastllama.inference.sampling import Sampling
from fastllama.model.kv_cache import KVCache
from fastllama.model.llama import Llama
from fastllama.run_folder import RunFolder
from fastllama_kernels import REFERENCE
from fastllama_kernels.attention import attention_without_cudnn


def sample_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw a token id from `logits` (V,): a 0-d int64 tensor on their device."""
    if sampling.temperature == 0:
        return logits_V.argmax()
    sorted_logits, ids = logits_V.float().sort(descending=True, stable=True)
    sorted_logits = sorted_logits[: sampling.top_k]
    # Relative to the largest, so that no temperature overflows.
    probabilities = ((sorted_logits - sorted_logits[0]) / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        # A token stays while the tokens before it sum to less than top_p, so the first stays.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return ids[torch.multinomial(probabilities, 1, generator=generator)[0]]


@torch.no_grad()
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
    """
    room = model.config.max_seq_len - len(prompt)
    if room < 1:
        raise ValueError(
            f"The prompt has {len(prompt)} tokens and the model's context is "
            f"{model.config.max_seq_len}; shorten the prompt."
        )
    device = model.cos_PR.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = KVCache(model.config)
    tokens = prompt
    for _ in range(min(sampling.max_new_tokens, room)):
        logits_BTV = model(torch.tensor([tokens], device=device), cache=cache)
        token = int(agree(sample_token(logits_BTV[0, -1], sampling, generator)))
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
) -> Iterator[str]:
    """Yield the text that follows `prompt`, in pieces of whole characters.

    A document starts after an end token, so an empty prompt becomes one.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    new: list[int] = []
    shown = ""
    for token in generate_tokens(model, ids or [end_token], sampling, end_token, agree):
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=False)
        # A token may end inside a character. The decoder then returns U+FFFD until the rest comes.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    if new:
        yield tokenizer.decode(new, skip_special_tokens=False)[len(shown) :]


@dataclass(frozen=True)
class LoadedRun:
    """A trained model in evaluation mode, and its tokenizer."""

    model: Llama
    tokenizer: Tokenizer
    end_token: int


def load_run(path: Path, device: torch.device) -> LoadedRun:
    """Load the newest whole checkpoint of a run folder, or one checkpoint inside it.

    Only the weights are read and checked, not AdamW's moments, two thirds of a checkpoint.

    Raises:
        ValueError: there is no run or checkpoint, or the checkpoint is damaged.
    """
    run = RunFolder(path)
    around = RunFolder(path.resolve().parent.parent)
    is_checkpoint = not run.exists and around.exists
    if is_checkpoint:
        run = around
    config = run.load_config()
    checkpoint: Path | None
    if is_checkpoint:
        checkpoint = path
        damage = find_damage(path, wanted=MODEL) or find_difference(path, identity={})
        if damage is not None:
            raise ValueError(
                f"The checkpoint is damaged: {damage}; use another one of {path.parent}."
            )
    else:
        checkpoint, _ = newest_checkpoint(run.checkpoints, identity={}, wanted=MODEL)
    if checkpoint is None:
        raise ValueError(f"{path} has no complete checkpoint yet; train on, or wait for the first.")
    with torch.device("meta"):
        # cuDNN would build a new plan for every token, because the number of keys changes.
        model = Llama(config.model, replace(REFERENCE, attention=attention_without_cudnn))
    if device.type == "cuda":
        # Parameters only: the rotary tables stay float32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, config.training.dtype))
    model.to_empty(device=device)
    model.tie_weights()
    model.init_rotary()
    load_tensors(checkpoint, model_tensors(model))
    end_token = read_identity(checkpoint)["data.end_token_id"]
    return LoadedRun(model.eval(), load_tokenizer(run.tokenizer), end_token)
