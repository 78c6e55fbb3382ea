"""The held-out loss: a mean over tokens, whatever the batch size."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from fastllama.config import load_recipe
from fastllama.data.dataset import open_dataset
from fastllama.data.packing import Packing
from fastllama.distributed.world import distributed
from fastllama.inference.evaluate import bits_per_byte, validation_loss
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
        found = validation_loss(model, held_out.stream, config, world, packing)
    # The tolerance is for float32 rounding of a loss near 6.
    assert found == pytest.approx(sum(losses) / n_sequences, rel=1e-6)
    assert model.training


def test_bits_per_byte(workspace: Workspace) -> None:
    dataset = open_dataset(load_recipe(workspace.recipe))
    split = dataset.sources[0].manifest.splits["validation"]
    # One nat per token over the whole split, in bits, divided by the split's bytes.
    expected = split.tokens / math.log(2) / split.text_bytes
    assert bits_per_byte(1.0, dataset.validation[0].bytes_per_token) == pytest.approx(expected)
