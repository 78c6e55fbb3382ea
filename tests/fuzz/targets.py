"""Every kind of file that the product reads, and what is read from it."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fastllama.config import Config, DataConfig, LoggingConfig, ModelConfig, load_recipe, validate
from fastllama.console import Console
from fastllama.data.dataset import open_dataset
from fastllama.data.documents import Document, Empty, Malformed, read_documents
from fastllama.data.encoding import encode_prompt
from fastllama.data.files import find_files
from fastllama.data.join import join
from fastllama.data.parts import Part
from fastllama.data.prepare import prepare
from fastllama.data.token_inputs import TOKEN_FILES, open_token_inputs
from fastllama.data.tokenizer import (
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from fastllama.inference.generate import generate_text
from fastllama.inference.load import load_run
from fastllama.inference.sampling import Sampling
from fastllama.logs.plot import plot_loss
from fastllama.logs.rows import Row
from fastllama.logs.sinks import MetricsLog
from fastllama.run_folder import RunFolder
from fastllama.train import train
from fastllama_kernels.attention_choice import _read as read_attention_cache
from tests.data import foreign
from tests.data.interrupted import SHARD_TOKENS, make_preparation
from tests.data.token_formats import WRITERS
from tests.workspace import make_workspace

TEXTS = [f"document {number}: naïve 日本 " + "ab " * number for number in range(12)]


@dataclass(frozen=True)
class Target:
    """Files of one kind, and how the product reads them."""

    make: Callable[[Path], None]
    """Writes the undamaged files into an empty folder."""
    use: Callable[[Path, Path], object]
    """Reads the first folder, a damaged copy, as the product does, and returns what a user gets.

    The second folder holds what `make` wrote beside the files, undamaged.
    """
    free: tuple[str, ...] = ()
    """Patterns of the files whose content is the user's: other content, another result. Of all
    other files, another result must come with a sentence."""
    may_lack: bool = False
    """Whether a file may be absent: nothing lists the files."""
    weight: int = 1
    """Share of the mutations."""


def _make_data(folder: Path) -> None:
    preparation = make_preparation(folder.parent)
    preparation.run(folder)


def _read_data(folder: Path, beside: Path) -> object:
    """Open a data folder as training does, read all of it, and check it."""
    config = Config(
        model=ModelConfig(vocab_size=300, max_seq_len=8),
        data=DataConfig(path=str(folder)),
        logging=LoggingConfig(sample_prompt="a"),
    )
    dataset = open_dataset(config)
    stream, manifest = dataset.sources[0].stream, dataset.sources[0].manifest
    n_sequences = stream.n_sequences(8)
    tokens = [stream.read(index, 8).tolist() for index in range(n_sequences)]
    manifest.check_contents(folder)
    return tokens, dataset.fingerprint(), manifest.splits


def _make_parts(folder: Path) -> None:
    preparation = make_preparation(folder.parent)
    for number in (1, 2):
        prepare(
            [str(preparation.corpus)],
            preparation.tokenizer,
            folder,
            shard_tokens=SHARD_TOKENS,
            part=Part(number, 2),
        )


def _join_parts(folder: Path, beside: Path) -> object:
    return join(folder), _read_data(folder, beside)


def _make_interrupted(folder: Path) -> None:
    preparation = make_preparation(folder.parent)
    preparation.interrupt()
    preparation.output.rename(folder)


def _resume_preparation(folder: Path, beside: Path) -> object:
    manifest = prepare(
        [str(beside / "corpus.jsonl")],
        beside / "tokenizer.json",
        folder,
        validation_fraction=0.3,
        shard_tokens=SHARD_TOKENS,
    )
    return manifest, [path.read_bytes() for path in sorted(folder.glob("*.npy"))]


def _make_run(folder: Path) -> None:
    """Train a model of 5 updates, with checkpoints after update 2 and 4."""
    workspace = make_workspace(folder.parent)
    text = (folder.parent / "tiny.toml").read_text()
    for old, new in (
        ("training_tokens = 2560", "training_tokens = 1280"),
        ("interval_tokens = 1280", "interval_tokens = 512"),
        ("eval_interval = 5", "eval_interval = 2"),
        ("warmup_iterations = 5", "warmup_iterations = 2"),
        ("max_seq_len = 32", "max_seq_len = 16"),
    ):
        assert old in text
        text = text.replace(old, new)
    workspace.recipe.write_text(text)
    config = load_recipe(workspace.recipe)
    train(config, RunFolder(folder), Console(quiet=True))
    # The last checkpoint would leave nothing to resume.
    newest = max((folder / "checkpoints").glob("step-*"))
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    latest = folder / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to(max((folder / "checkpoints").glob("step-*")).name)


def _generate(folder: Path, beside: Path) -> object:
    loaded = load_run(folder, torch.device("cpu"))
    sampling = Sampling(max_new_tokens=4, temperature=0)
    return list(generate_text(loaded.model, loaded.tokenizer, "def", sampling, loaded.end_token))


def _resume_training(folder: Path, beside: Path) -> object:
    run = RunFolder(folder)
    config = run.load_config()
    # Other values are right, but may train for hours.
    training = replace(config.training, training_tokens=1280, compile=False)
    config = replace(config, training=training)
    try:
        validate(config, 1)
    except ValueError as error:
        # Such an error names the option, which may come from the command line as well.
        raise ValueError(f"config.toml: {error}") from None
    done = train(config, run, Console(stderr=True), resume=True)
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    row = json.loads(last)
    return done, {name: row[name] for name in ("step", "loss", "grad_norm", "val_loss")}


def _make_logs(folder: Path) -> None:
    folder.mkdir()
    log = MetricsLog(folder, 0, tensorboard=False, say=_say)
    for step in range(1, 9):
        log.write(_row(step))
    log.close()
    for name in ("bad-updates", "samples"):
        lines = [json.dumps({"step": step, "text": "é $x$ [b]"}) + "\n" for step in range(1, 9)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def _row(step: int) -> Row:
    values: dict[str, Any] = dict.fromkeys(Row.__dataclass_fields__, 1.5)
    return Row(**{**values, "step": step, "tokens_total": step * 256, "skipped_steps": 0})


def _say(sentence: str) -> None:
    print(sentence)


def _use_logs(folder: Path, beside: Path) -> object:
    """Resume the logs after update 6, write update 7, and draw the plot."""
    log = MetricsLog(folder, 6, tensorboard=False, say=_say)
    log.write(_row(7))
    log.sync()
    log.close()
    if (folder / "metrics.csv").is_file():
        plot_loss(folder / "metrics.csv", folder / "loss.png", "a $run_name")
    return (folder / "metrics.jsonl").read_bytes()


def _make_recipe(folder: Path) -> None:
    folder.mkdir()
    recipe = (Path(__file__).parents[2] / "configs" / "quickstart.toml").read_text()
    (folder / "base.toml").write_text(recipe)
    (folder / "recipe.toml").write_text(
        'extends = "base.toml"\n[training]\nbatch_size = 4\nz_loss = 1e-4\n[model]\nn_layers = 2\n'
    )


def _read_recipe(folder: Path, beside: Path) -> object:
    config = load_recipe(folder / "recipe.toml")
    try:
        validate(config, 1)
    except ValueError as error:
        # Such an error names the option, which may come from the command line as well.
        raise ValueError(f"recipe.toml or base.toml: {error}") from None
    return config


def _make_inputs(folder: Path) -> None:
    folder.mkdir()
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS)
    (folder / "lines.jsonl").write_text(lines)
    (folder / "list.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    (folder / "one.txt").write_text(TEXTS[0])


def _make_compressed_inputs(folder: Path) -> None:
    folder.mkdir()
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20).encode()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(data, mtime=0))
    (folder / "b.jsonl.bz2").write_bytes(bz2.compress(data))
    (folder / "c.jsonl.xz").write_bytes(lzma.compress(data))


def _make_parquet(folder: Path) -> None:
    folder.mkdir()
    table = pa.table({"text": TEXTS * 4, "id": range(len(TEXTS) * 4)})
    for compression in ("snappy", "zstd", "none"):
        pq.write_table(
            table,
            folder / f"{compression}.parquet",
            compression=compression,
            row_group_size=20,
            write_page_checksum=True,
        )


def _make_zstd(folder: Path) -> None:
    folder.mkdir()
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20).encode()
    (folder / "d.jsonl.zst").write_bytes(pa.compress(data, "zstd", asbytes=True))


def _read_inputs(folder: Path, beside: Path) -> object:
    found = find_files([str(folder)])
    print(found.describe_left_out())
    texts = []
    for record in read_documents(found.paths):
        match record:
            case Document():
                texts.append(record.text)
            case Empty():
                print(f"{found.paths[record.file]} has a record without text")
            case Malformed():
                print(f"{record.where}: {record.reason}")
    return texts


def _make_token_files(folder: Path) -> None:
    folder.mkdir()
    documents = [list(range(4, 4 + length)) for length in (3, 70, 0, 41)]
    for name in ("nanoGPT", "llm.c", "datatrove, 32 bits", "npy of <i8", "Megatron of <i4"):
        WRITERS[name](folder / name.replace(" ", "-"), documents)


def _read_token_files(folder: Path, beside: Path) -> object:
    """Read each file as `data import` does, which takes files of one format at a time."""
    found = find_files([str(folder)], TOKEN_FILES).paths
    results = []
    for path in (path for path in found if path.suffix in (".bin", ".ds", ".npy")):
        [file] = open_token_inputs([path], None, 300)
        for ids, ends in file.read(300):
            results.append((ids.tolist(), ends if ends is None else ends.tolist()))
    return results


def _make_tokenizers(folder: Path) -> None:
    folder.mkdir()
    for name, make in foreign.ALL.items():
        save_tokenizer(make(), folder / f"{name}.json")
    save_tokenizer(train_tokenizer(TEXTS, 300), folder / "ours.json")


def _use_tokenizers(folder: Path, beside: Path) -> object:
    results = []
    for path in sorted(folder.glob("*.json")):
        tokenizer = load_tokenizer(path)
        try:
            ids = encode_prompt(tokenizer, TEXTS[1], 0)
        except ValueError as error:
            # A command is given one tokenizer.
            raise ValueError(f"{path}: {error}") from None
        results.append(
            (ids, tokenizer.decode(ids), fingerprint(tokenizer), vocabulary_size(tokenizer))
        )
    return results


def _make_attention_cache(folder: Path) -> None:
    folder.mkdir()
    choice = {"name": "sdpa", "reason": "1.20x as fast as reference, measured"}
    (folder / "attention.json").write_text(json.dumps({"cpu torch 2.13": choice}))


def _read_attention_cache(folder: Path, beside: Path) -> object:
    return read_attention_cache(folder / "attention.json")


TARGETS = {
    "data folder": Target(_make_data, _read_data, weight=4),
    "parts, join": Target(_make_parts, _join_parts, weight=2),
    "interrupted prepare": Target(_make_interrupted, _resume_preparation, weight=2),
    "run, generate": Target(_make_run, _generate, weight=3),
    "run, resume": Target(_make_run, _resume_training, free=("config.toml",)),
    "logs": Target(_make_logs, _use_logs, free=("*",), weight=2),
    "recipes": Target(_make_recipe, _read_recipe, free=("*",), weight=4),
    "inputs": Target(_make_inputs, _read_inputs, free=("*",), weight=4),
    "compressed inputs": Target(_make_compressed_inputs, _read_inputs, may_lack=True, weight=4),
    # Whether a zstd frame has a checksum is up to the program that wrote it.
    "zstd inputs": Target(_make_zstd, _read_inputs, free=("*",), weight=2),
    "parquet inputs": Target(_make_parquet, _read_inputs, may_lack=True, weight=4),
    "token files": Target(_make_token_files, _read_token_files, free=("*",)),
    "tokenizers": Target(_make_tokenizers, _use_tokenizers, free=("*",), weight=3),
    "attention cache": Target(_make_attention_cache, _read_attention_cache, free=("*",)),
}
