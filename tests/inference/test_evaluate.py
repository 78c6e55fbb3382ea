"""The held-out loss: a mean over tokens, whatever the batch size."""

import dataclasses
import math

import pytest
import torch

from fastllama.config import load_recipe
from fastllama.data.dataset import open_dataset
from fastllama.distributed.world import distributed
from fastllama.inference.evaluate import bits_per_byte, validation_loss
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE
from tests.workspace import Workspace


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_mean_over_the_first_sequences(workspace: Workspace, batch_size: int) -> None:
    config = load_recipe(workspace.recipe)
    training = dataclasses.replace(config.training, batch_size=batch_size, eval_tokens=8 * 32)
    config = dataclasses.replace(config, training=training)
    dataset = open_dataset(config)
    (held_out,) = dataset.validation
    # 8 sequences do not fill batches of 3: the last batch has a row of ignored targets.
    assert held_out.stream.n_sequences(32) > 8
    model = Llama(config.model, REFERENCE)
    model.init_weights(seed=0)
    losses = []
    for index in range(8):
        tokens = torch.from_numpy(held_out.stream.read(index, 32).astype("int64"))
        logits = model(tokens[None, :-1])[0].double()
        losses.append(-logits.log_softmax(-1)[torch.arange(32), tokens[1:]].mean().item())
    with distributed(config) as world:
        found = validation_loss(model, held_out.stream, config, world)
    # The tolerance is for float32 rounding of a loss near 6.
    assert found == pytest.approx(sum(losses) / 8, rel=1e-6)
    assert model.training


def test_bits_per_byte(workspace: Workspace) -> None:
    dataset = open_dataset(load_recipe(workspace.recipe))
    split = dataset.sources[0].manifest.splits["validation"]
    # One nat per token over the whole split, in bits, divided by the split's bytes.
    expected = split.tokens / math.log(2) / split.text_bytes
    assert bits_per_byte(1.0, dataset.validation[0].bytes_per_token) == pytest.approx(expected)
