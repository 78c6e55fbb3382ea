"""The workload shared by all contenders: tokens, their order, initial weights, updates."""

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

UPDATES_PER_EPOCH = 16
"""Updates per pass over the synthetic data. Every pass has a different order."""
UNLIMITED_UPDATES = 1_000_000
FOLLOW_PROBABILITY = 0.9
"""Probability that the next token is the image of the current one under the permutation."""


def workload(config: Config, tokens_per_update: int) -> Config:
    """A recipe as measured: no side jobs, no end, constant learning rate after five updates.

    With a warm-up of hundreds of updates the loss would hardly move, and contenders that learn
    nothing would pass the parity check. Without a warm-up, AdamW's first updates change every
    weight by the full learning rate whatever its gradient, which amplifies rounding differences.
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
    """A recipe shrunk so far that an update on a CPU takes a fraction of a second."""
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
    """Write synthetic data that a model learns in a few updates; return `config` with its path."""
    vocab_size = config.model.vocab_size
    dtype = np.dtype("uint16" if vocab_size <= 2**16 else "uint32")
    n_tokens = UPDATES_PER_EPOCH * config.training.tokens_per_update + 1
    folder.mkdir(parents=True)
    writer = SplitWriter(folder, "train", n_tokens, SplitProgress(), dtype)
    writer.append(synthetic_tokens(n_tokens, vocab_size, config.training.seed).astype(dtype))
    # The trainer requires a tokenizer file. Training never uses it.
    tokenizer = train_tokenizer([], vocab_size=260)
    save_tokenizer(tokenizer, folder / TOKENIZER_FILE)
    Manifest(
        dtype=dtype.name,
        vocab_size=vocab_size,
        end_token_id=0,
        tokenizer_fingerprint=fingerprint(tokenizer),
        skipped_records=0,
        splits={"train": Split(n_tokens, 1, n_tokens, tuple(writer.shards))},
    ).save(folder)
    return replace(config, data=DataConfig(path=str(folder), prefetch=config.data.prefetch))


def synthetic_tokens(n_tokens: int, vocab_size: int, seed: int) -> NDArray[np.int64]:
    """(n_tokens,) token ids, each random or the image of the previous id under a permutation."""
    rng = np.random.default_rng(seed)
    image = rng.permutation(vocab_size)
    # Many chains in parallel: a chain is computed one token at a time.
    n_steps = min(n_tokens, 4096)
    n_chains = -(-n_tokens // n_steps)
    tokens = rng.integers(0, vocab_size, (n_steps, n_chains))
    follows = rng.random((n_steps, n_chains)) < FOLLOW_PROBABILITY
    for step in range(1, n_steps):
        tokens[step, follows[step]] = image[tokens[step - 1, follows[step]]]
    return tokens.T.reshape(-1)[:n_tokens]


def read_batches(config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets of each micro-batch, (B, T) int64 on the host, read on demand."""
    stream = open_dataset(config).sources[0].stream
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
    """Our model on plain PyTorch operators, with the initial weights of all contenders.

    The weights are drawn on `device`, as in the trainer: CPU and GPU generators differ per seed.
    """
    with torch.device(device):
        model = Llama(config.model, REFERENCE)
    model.init_weights(config.training.seed)
    return model
