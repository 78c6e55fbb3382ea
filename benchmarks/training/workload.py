"""What every contender trains: the same tokens in the same order, weights and updates."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastllama.config import Config, DataConfig
from fastllama.data.dataset import open_dataset
from fastllama.data.manifest import TOKENIZER_FILE, Manifest, Split
from fastllama.data.order import sequence_indices
from fastllama.data.shards import SplitProgress, SplitWriter
from fastllama.data.tokenizer import fingerprint, save_tokenizer, train_tokenizer
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE

UPDATES_OF_DATA = 16
"""Updates until the sequences come again, in another order."""
UNLIMITED_UPDATES = 1_000_000
FOLLOWED = 0.9
"""Probability that a token is followed by its image under the permutation."""


def workload(config: Config, tokens_per_update: int) -> Config:
    """A recipe as it is measured: no side jobs, no end, and a constant rate after five updates.

    A warm-up of hundreds of updates would leave the loss where it begins, and then contenders that
    learn nothing would agree. With none, the first updates of a large model are by the full rate in
    every weight, whatever its gradient, and magnify how contenders round.
    """
    return replace(
        config,
        model=replace(config.model, dropout=0.0),
        optimizer=replace(config.optimizer, schedule="constant", warmup_iterations=5),
        training=replace(
            config.training,
            tokens_per_update=tokens_per_update,
            training_tokens=UNLIMITED_UPDATES * tokens_per_update,
            device="auto",
            eval_interval=0,
        ),
        checkpoint=replace(config.checkpoint, interval_tokens=0),
        logging=replace(config.logging, log_interval=1, sample_interval=0, sample_prompt=""),
    )


def rehearsal(config: Config) -> Config:
    """A recipe made so small that a CPU does an update in a blink."""
    return replace(
        config,
        model=replace(
            config.model,
            vocab_size=512,
            n_embd=64,
            n_layers=2,
            n_heads=2,
            n_kv_heads=None,
            multiple_of=32,
            max_seq_len=64,
        ),
        training=replace(
            config.training,
            batch_size=4,
            tokens_per_update=2048,
            dtype="float32",
            compile=False,
        ),
    )


def with_synthetic_data(config: Config, folder: Path) -> Config:
    """Write a data folder that can be learnt within a few updates, and point `config` at it."""
    vocab_size = config.model.vocab_size
    dtype = np.dtype("uint16" if vocab_size <= 2**16 else "uint32")
    n_tokens = UPDATES_OF_DATA * config.training.tokens_per_update + 1
    folder.mkdir(parents=True)
    progress = SplitProgress()
    writer = SplitWriter(folder, "train", n_tokens, progress, dtype)
    writer.append(synthetic_tokens(n_tokens, vocab_size, config.training.seed).astype(dtype))
    # The trainer wants a tokenizer; that it made no tokens changes nothing of training on them.
    tokenizer = train_tokenizer([], vocab_size=260)
    save_tokenizer(tokenizer, folder / TOKENIZER_FILE)
    Manifest(
        dtype=dtype.name,
        vocab_size=vocab_size,
        end_token_id=0,
        tokenizer_fingerprint=fingerprint(tokenizer),
        skipped_records=0,
        splits={"train": Split(n_tokens, 1, n_tokens, tuple(progress.shards))},
    ).save(folder)
    return replace(config, data=DataConfig(path=str(folder), prefetch=config.data.prefetch))


def synthetic_tokens(n_tokens: int, vocab_size: int, seed: int) -> NDArray[np.int64]:
    """(n_tokens,) ids: each the image of the one before under a permutation, or drawn anew."""
    draw = np.random.default_rng(seed)
    image = draw.permutation(vocab_size)
    # Chains side by side, because one is as long to compute as it has tokens.
    n_steps = min(n_tokens, 4096)
    n_chains = -(-n_tokens // n_steps)
    tokens = draw.integers(0, vocab_size, (n_steps, n_chains))
    follows = draw.random((n_steps, n_chains)) < FOLLOWED
    for step in range(1, n_steps):
        tokens[step, follows[step]] = image[tokens[step - 1, follows[step]]]
    return tokens.T.reshape(-1)[:n_tokens]


def read_batches(config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of each micro-batch, (B, T) int64 on the host, read when asked for."""
    stream = open_dataset(config).train
    batch_size, seq_len = config.training.batch_size, config.model.max_seq_len
    first = 0
    while True:
        positions = np.arange(first, first + batch_size, dtype=np.int64)
        indices = sequence_indices(positions, stream.n_sequences(seq_len), config.training.seed)
        rows = np.stack([stream.read(int(index), seq_len) for index in indices]).astype(np.int64)
        sequences = torch.from_numpy(rows)
        yield sequences[:, :-1], sequences[:, 1:]
        first += batch_size


def initial_model(config: Config, device: torch.device) -> Llama:
    """The model of plain PyTorch operators with the weights that all contenders start from.

    Drawn on `device`, as the trainer draws them: a seed means other numbers on a CPU.
    """
    with torch.device(device):
        model = Llama(config.model, REFERENCE)
    model.init_weights(config.training.seed)
    return model
