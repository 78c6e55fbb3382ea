"""Opens the data folders of a training and checks that they fit the model and each other."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from fastllama.config import Config
from fastllama.data.encoding import encode_prompt
from fastllama.data.manifest import DataFolder, Manifest
from fastllama.data.remote_folder import RemoteFolder
from fastllama.data.stream import TokenStream
from fastllama.data.text_bytes import TextBytes
from fastllama.data.tokenizer import fingerprint, load_tokenizer
from fastllama.data.training_data import TrainingData
from fastllama.typed_json import DamagedFileError
from fastllama.urls import is_url


@dataclass(frozen=True)
class Source:
    """A data folder to train on."""

    name: str
    folder: DataFolder
    manifest: Manifest
    stream: TokenStream
    max_epochs: float
    """Largest number of epochs of a run; 0 sets no limit."""


@dataclass(frozen=True)
class HeldOut:
    """A stream of text to validate on."""

    name: str
    stream: TokenStream


@dataclass(frozen=True)
class Dataset:
    """The token streams of a training and their tokenizer."""

    sources: tuple[Source, ...]
    train: TrainingData
    validation: tuple[HeldOut, ...]
    """Without validation splits that are missing or shorter than a sequence."""
    tokenizer: Tokenizer
    end_token_id: int

    @property
    def folder(self) -> DataFolder:
        """The first data folder; the tokenizer of all is in it."""
        return self.sources[0].folder

    @cached_property
    def text_bytes(self) -> TextBytes:
        """Counts the bytes of the text of token ids."""
        return TextBytes(self.tokenizer, self.end_token_id)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the training data. Equal data has equal values."""
        fingerprints = [source.manifest.fingerprint() for source in self.sources]
        if len(fingerprints) == 1:
            return fingerprints[0]
        return hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()


def open_dataset(config: Config) -> Dataset:
    """Open the folders of `data`. Reads the headers of the shards, not their tokens.

    Raises:
        ValueError: a folder is missing, incomplete or damaged, was prepared with another
            tokenizer, has no training split, has more token ids than `model.vocab_size`, is
            shorter than one sequence, or would be read more often than its `max_epochs`; or the
            sample prompt fills a whole sequence.
    """
    data = config.data
    if not (data.path or data.sources):
        raise ValueError("data.path is empty; give the folder that `fastllama prepare` wrote.")
    if data.path:
        sources = [_open_source(config, data.path)]
    else:
        sources = [
            _open_source(config, source.path, name, source.max_epochs)
            for source, name in zip(data.sources, data.source_names, strict=True)
        ]
    first = sources[0]
    tokenizer = first.manifest.open_tokenizer(first.folder)
    if data.tokenizer:
        wanted = fingerprint(load_tokenizer(Path(data.tokenizer)))
        if wanted != first.manifest.tokenizer_fingerprint:
            raise ValueError(
                f"{first.folder} was not prepared with the tokenizer {data.tokenizer}; prepare the "
                "data again with this tokenizer, or set data.tokenizer to the tokenizer of the "
                "data."
            )
    validation = _open_validation(config, sources)
    for source in sources[1:]:
        _check_same_tokens(first, source.folder, source.manifest)
    train = TrainingData(
        [source.stream for source in sources],
        block_len=config.longest_seq_len,
        seed=config.training.seed,
        weights=config.weights,
    )
    _check_epochs(config, sources, train)
    end_token_id = first.manifest.end_token_id
    prompt = encode_prompt(tokenizer, config.logging.sample_prompt, end_token_id)
    if len(prompt) >= config.model.max_seq_len:
        raise ValueError(
            f"logging.sample_prompt fills the {config.model.max_seq_len} tokens of a sequence and "
            "leaves no room for a sample; shorten it."
        )
    held_out = tuple(
        HeldOut(name, stream)
        for name, folder, manifest, split_name in validation
        if split_name in manifest.splits
        and (stream := TokenStream(folder, manifest, split_name)).n_sequences(
            config.model.max_seq_len
        )
    )
    return Dataset(tuple(sources), train, held_out, tokenizer, end_token_id)


def open_folder(
    value: str, cache_dir: str = "", cache_gb: float = 0.0
) -> tuple[DataFolder, Manifest]:
    """The data folder at a path or URL, and its manifest.

    The options are those of `DataConfig`; without `cache_gb`, what is read behind a URL is not
    kept.

    Raises:
        ValueError: the folder is missing, incomplete or damaged, or may not be read.
        OSError: the network or the disk fails.
    """
    if is_url(value) and not value.startswith("file://"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastllama" / "data"
        remote = RemoteFolder.open(
            value, Path(cache_dir or cache).expanduser(), int(cache_gb * 10**9)
        )
        try:
            return remote, Manifest.load(remote.local)
        except DamagedFileError as error:
            raise DamagedFileError(str(error).replace(str(remote.local), remote.url)) from None
    folder = Path(os.path.expanduser(value.removeprefix("file://")))
    if value.startswith("~") and not folder.exists():
        raise ValueError(
            f"the data folder {value} is {folder}, in your home folder, and does not exist: make "
            "it with fastllama prepare"
        )
    return folder, Manifest.load(folder)


def _open_source(config: Config, path: str, name: str = "", max_epochs: float = 0.0) -> Source:
    folder, manifest = open_folder(path, config.data.cache_dir, config.data.cache_gb)
    if "train" not in manifest.splits:
        raise ValueError(
            f"{folder} has no training split: prepare the data again with a smaller "
            "--validation-fraction."
        )
    if manifest.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the tokenizer's "
            f"{manifest.vocab_size} entries in {folder}; raise model.vocab_size to at least "
            f"{manifest.vocab_size}."
        )
    stream = TokenStream(folder, manifest, "train")
    longest = config.longest_seq_len
    if stream.n_sequences(longest) < 1:
        option = "model.max_seq_len"
        if longest != config.model.max_seq_len:
            option = "max_seq_len of data.stages"
        raise ValueError(
            f"{option} = {longest} is longer than the data, {stream.n_tokens} tokens in {folder}; "
            f"prepare more text or lower {option}."
        )
    return Source(name, folder, manifest, stream, max_epochs)


def _open_validation(
    config: Config, sources: list[Source]
) -> Sequence[tuple[str, DataFolder, Manifest, str]]:
    """Name, folder, manifest and split of each validation set.

    Raises:
        ValueError: a set that `data.validation` names cannot be used.
    """
    if not config.data.validation:
        return [(source.name, source.folder, source.manifest, "validation") for source in sources]
    found = []
    names = config.data.validation_names
    for number, (wanted, name) in enumerate(zip(config.data.validation, names, strict=True)):
        folder, manifest = open_folder(wanted.path, config.data.cache_dir, config.data.cache_gb)
        _check_same_tokens(sources[0], folder, manifest)
        split = manifest.splits.get(wanted.split)
        if split is None or split.tokens <= config.model.max_seq_len:
            tokens = 0 if split is None else split.tokens
            raise ValueError(
                f"{folder} has {tokens} tokens in its {wanted.split} split, less than a sequence; "
                "prepare more text for validation, or name the other split by "
                f"data.validation.{number}.split."
            )
        found.append((name, folder, manifest, wanted.split))
    return found


def _check_same_tokens(first: Source, folder: DataFolder, manifest: Manifest) -> None:
    for what, ours, other in (
        ("tokenizer", first.manifest.tokenizer_fingerprint, manifest.tokenizer_fingerprint),
        ("end token", first.manifest.end_token_id, manifest.end_token_id),
    ):
        if ours != other:
            raise ValueError(
                f"{folder} and {first.folder} were prepared with different {what}s; prepare one of "
                f"them again with the {what} of the other."
            )


def _check_epochs(config: Config, sources: list[Source], train: TrainingData) -> None:
    end = config.n_updates * config.positions_per_update
    for source, epochs in zip(sources, train.epochs(end), strict=True):
        if 0 < source.max_epochs < epochs:
            raise ValueError(
                f"the run reads the source {source.name} {epochs:.2f} times, and its max_epochs is "
                f"{source.max_epochs:g}; lower its weight or training.training_tokens, prepare "
                "more of it, or raise max_epochs."
            )
        if not epochs:
            raise ValueError(
                f"the run never reads the source {source.name}, whose weights are all 0 or too "
                "small for training.training_tokens; leave it out, or give it a larger weight."
            )
