"""The held-out loss: a mean over tokens, whatever the batch size."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from fastllama.config import load_recipe
from fastllama.data.dataset import open_dataset
from fastllama.data.packing import Packing
from fastllama.data.text_bytes import TextBytes
from fastllama.distributed.world import distributed
from fastllama.inference.evaluate import validation_loss
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE
from tests.workspace import Workspace


@pytest.mark.parametrize(("batch_size", "room"), [(1, None), (3, None), (4, None), (4, 16), (3, 1)])
def test_mean_over_the_first_sequences(
    workspace: Workspace, batch_size: int, room: int | None
) -> None:
    config = load_recipe(workspace.recipe)
    n_sequences = 8 if room is None else 20
    eval_tokens = n_sequences * 32
    training = dataclasses.replace(config.training, batch_size=batch_size, eval_tokens=eval_tokens)
    config = dataclasses.replace(config, training=training)
    dataset = open_dataset(config)
    (held_out,) = dataset.validation
    # They do not fill batches of 3: the last batch has a row of ignored targets.
    assert held_out.stream.n_sequences(32) > n_sequences
    model = Llama(config.model, REFERENCE)
    model.init_weights(seed=0)
    packing = None if room is None else Packing(dataset.end_token_id, room)
    losses, n_documents = [], 0
    for index in range(n_sequences):
        tokens = torch.from_numpy(held_out.stream.read(index, 32).astype("int64"))
        borders = [0, 32]
        if packing is not None:
            ends = (tokens[1:-1] == packing.end_token_id).nonzero().flatten() + 1
            borders[1:1] = ends.tolist()
        documents = [tokens[None, start:end] for start, end in pairwise(borders)]
        logits = torch.cat([model(document)[0] for document in documents]).double()
        losses.append(-logits.log_softmax(-1)[torch.arange(32), tokens[1:]].mean().item())
        n_documents += len(documents)
    assert (n_documents > n_sequences) == (packing is not None)
    with distributed(config) as world:
        text = dataset.text_bytes
        found, _ = validation_loss(model, held_out.stream, text, config, world, packing)
    # The tolerance is for float32 rounding of a loss near 6.
    assert found == pytest.approx(sum(losses) / n_sequences, rel=1e-6)
    assert model.training


@pytest.mark.parametrize("eval_tokens", [5 * 32, 10**9])
def test_bits_are_those_of_the_text_that_was_read(workspace: Workspace, eval_tokens: int) -> None:
    config = load_recipe(workspace.recipe)
    training = dataclasses.replace(config.training, batch_size=3, eval_tokens=eval_tokens)
    config = dataclasses.replace(config, training=training)
    dataset = open_dataset(config)
    stream = dataset.validation[0].stream
    n_sequences = min(5, stream.n_sequences(32)) if eval_tokens < 10**9 else stream.n_sequences(32)
    model = Llama(config.model, REFERENCE)
    model.init_weights(seed=0)
    with distributed(config) as world:
        loss, bits = validation_loss(model, stream, dataset.text_bytes, config, world)
    targets = np.concatenate([stream.read(index, 32)[1:] for index in range(n_sequences)])
    # End tokens are no text. Tokens at the ends may hold a part of a character.
    decode = dataset.tokenizer.decode
    text = decode(targets[targets != dataset.end_token_id].tolist(), skip_special_tokens=False)
    assert "\ufffd" not in text
    expected = loss * len(targets) / math.log(2) / len(text.encode())
    assert bits == pytest.approx(expected, rel=1e-12)


def test_tokens_without_text_have_no_bits(workspace: Workspace) -> None:
    config = load_recipe(workspace.recipe)
    dataset = open_dataset(config)
    model = Llama(config.model, REFERENCE)
    model.init_weights(seed=0)
    text = TextBytes(dataset.tokenizer, dataset.end_token_id)
    with distributed(config) as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "count", lambda ids, before: 0)
        stream = dataset.validation[0].stream
        loss, bits = validation_loss(model, stream, text, config, world)
    assert math.isfinite(loss)
    assert math.isnan(bits)
