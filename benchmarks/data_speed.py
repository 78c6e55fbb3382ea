"""Speed of the data: prepare against the tokenizer alone, and reading micro-batches.

    python benchmarks/data_speed.py [--rounds 5] [--copies 4] [--output FILE.json]

prepare     The whole command, start-up included, on the quickstart's corpus, repeated. Its rivals
            are processes that read the same JSON Lines and call `encode_batch` or
            `encode_batch_fast` of `tokenizers`, and keep nothing. All take turns.
opening     A data folder of 10,000 shards, opened as training does, and the memory that it takes.
reading     Micro-batches of `BatchLoader` from the page cache, in tokens a second of one process.

Prints medians and extremes. A ratio is the time of the faster rival over that of prepare in the
same round. Needs the corpus of `make train`.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.conditions import current_conditions
from benchmarks.cpu_commands import seconds
from benchmarks.cpu_throughput import RECIPE, ROOT
from fastllama.config import Config, DataConfig, LoggingConfig, ModelConfig, load_recipe
from fastllama.data.dataset import open_dataset
from fastllama.data.loader import BatchLoader
from fastllama.data.manifest import Manifest, Shard, Split, sha256_of
from fastllama.data.tokenizer import fingerprint, load_tokenizer, save_tokenizer, vocabulary_size

ALONE = """
import json, sys
from tokenizers import Tokenizer
encode = getattr(Tokenizer.from_file(sys.argv[2]), sys.argv[3])
batch, characters = [], 0
for line in open(sys.argv[1]):
    batch.append(json.loads(line)["text"])
    characters += len(batch[-1])
    if characters > 4_000_000:
        encode(batch, add_special_tokens=False)
        batch, characters = [], 0
encode(batch, add_special_tokens=False)
"""
N_SHARDS = 10_000
READ_SECONDS = 3.0
SHAPES = ((256, 32), (2048, 16), (8192, 8))
"""Sequence lengths, and sequences of a micro-batch."""


def time_encoding(folder: Path, copies: int, rounds: int) -> list[dict[str, float]]:
    """Seconds of prepare and of its rivals in each round, and the tokens that prepare wrote."""
    data = ROOT / load_recipe(RECIPE).data.path
    corpus, tokenizer = folder / "corpus.jsonl", f"{data}-tokenizer.json"
    corpus.write_bytes(Path(f"{data}.jsonl").read_bytes() * copies)
    found = []
    for number in range(rounds):
        output = folder / f"data-{number}"
        ours = [sys.executable, "-m", "fastllama", "prepare", "--input", str(corpus)]
        row = {"prepare": seconds([*ours, "--tokenizer", tokenizer, "--output", str(output)])}
        for name in ("encode_batch", "encode_batch_fast"):
            row[name] = seconds([sys.executable, "-c", ALONE, str(corpus), tokenizer, name])
        row["tokens"] = Manifest.load(output).splits["train"].tokens
        found.append(row)
        print(f"round {number + 1} of {rounds}", flush=True)
    return found


def make_folder(folder: Path, tokenizer: Tokenizer, n_shards: int, shard_tokens: int) -> None:
    """Write a data folder of random tokens."""
    folder.mkdir()
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    vocab_size, random = vocabulary_size(tokenizer), np.random.default_rng(0)
    shards = []
    for number in range(n_shards):
        path = folder / f"train-{number:05d}.npy"
        np.save(path, random.integers(0, vocab_size, shard_tokens, dtype=np.uint16))
        shards.append(Shard(path.name, shard_tokens, sha256_of(path)))
    total = n_shards * shard_tokens
    Manifest(
        dtype="uint16",
        vocab_size=vocab_size,
        end_token_id=1,
        tokenizer_fingerprint=fingerprint(tokenizer),
        skipped_records=0,
        splits={"train": Split(total, 1, total, tuple(shards))},
    ).save(folder)


def config_of(folder: Path, seq_len: int) -> Config:
    """A configuration that trains on `folder`."""
    return Config(
        model=ModelConfig(max_seq_len=seq_len),
        data=DataConfig(path=str(folder)),
        logging=LoggingConfig(sample_prompt="a"),
    )


def time_opening(folder: Path, rounds: int) -> list[float]:
    """Seconds to open a data folder."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        open_dataset(config_of(folder, 2048))
        found.append(time.perf_counter() - began)
    return found


def reading_rate(folder: Path, seq_len: int, batch_size: int) -> float:
    """Tokens a second of the loader, whose ring is full at the start."""
    data = open_dataset(config_of(folder, seq_len)).train
    device = torch.device("cpu")
    with BatchLoader(data, seq_len=seq_len, batch_size=batch_size, device=device) as loader:
        n_batches, began = 0, time.perf_counter()
        while time.perf_counter() - began < READ_SECONDS:
            loader.next()
            n_batches += 1
        return n_batches * batch_size * seq_len / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--copies", type=int, default=6, help="copies of the corpus")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    tokenizer = load_tokenizer(Path(f"{ROOT / load_recipe(RECIPE).data.path}-tokenizer.json"))
    with tempfile.TemporaryDirectory() as root:
        many, large = Path(root) / "many", Path(root) / "large"
        make_folder(many, tokenizer, N_SHARDS, 5_000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        opening = time_opening(many, options.rounds)
        # Linux counts in KiB.
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
        make_folder(large, tokenizer, 50, 2_000_000)
        reading = {
            f"{seq_len} x {batch_size}": [
                reading_rate(large, seq_len, batch_size) for _ in range(options.rounds)
            ]
            for seq_len, batch_size in SHAPES
        }
        encoding = time_encoding(Path(root), options.copies, options.rounds)
    seconds_to_open = _spread(opening, ".2f")
    print(f"opening {N_SHARDS:,} shards: {seconds_to_open} s, {grown:.0f} MiB more at the peak")
    for shape, per_second in reading.items():
        print(f"reading {shape}: {_spread([n / 1e6 for n in per_second], '.1f')} M tokens/s")
    rates = [row["tokens"] / row["prepare"] / 1e6 for row in encoding]
    alone = [min(row["encode_batch"], row["encode_batch_fast"]) for row in encoding]
    ratios = [best / row["prepare"] for best, row in zip(alone, encoding, strict=True)]
    print(
        f"prepare: {_spread(rates, '.2f')} M tokens/s on {os.cpu_count()} cores, "
        f"{_spread(ratios, '.3f')} of the faster tokenizer alone"
    )
    if options.output:
        content = {
            "conditions": asdict(current_conditions()),
            "copies": options.copies,
            "opening_seconds": opening,
            "opening_mebibytes": grown,
            "reading_tokens_per_second": reading,
            "encoding_seconds": encoding,
        }
        options.output.write_text(json.dumps(content, indent=2) + "\n")


def _spread(values: list[float], spec: str) -> str:
    median = format(statistics.median(values), spec)
    return f"{median} ({min(values):{spec}} to {max(values):{spec}})"


if __name__ == "__main__":
    main()
