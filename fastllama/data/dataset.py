"""Opens a data folder for training and checks that it fits the model."""

import os
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from fastllama.config import Config
from fastllama.data.encoding import encode_prompt
from fastllama.data.manifest import Manifest
from fastllama.data.stream import TokenStream
from fastllama.data.tokenizer import fingerprint, load_tokenizer


@dataclass(frozen=True)
class Dataset:
    """The token streams of a data folder and its tokenizer.

    `validation` is None where the held-out split is missing or shorter than one sequence.
    """

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream | None

    @property
    def validation_bytes_per_token(self) -> float:
        """Mean UTF-8 bytes of text per token of the held-out split."""
        split = self.manifest.splits["validation"]
        return split.text_bytes / split.tokens


def open_dataset(config: Config) -> Dataset:
    """Open the folder `data.path`. Reads the headers of the shards, not their tokens.

    Raises:
        ValueError: the folder is missing, incomplete or damaged, was prepared with another
            tokenizer, has no training split, has more token ids than `model.vocab_size`, or is
            shorter than one sequence; or the sample prompt fills a whole sequence.
    """
    if not config.data.path:
        raise ValueError("data.path is empty; give the folder that `fastllama prepare` wrote.")
    folder = Path(os.path.expanduser(config.data.path))
    if config.data.path.startswith("~") and not folder.exists():
        raise ValueError(
            f"data.path = {config.data.path} is {folder}, in your home folder, and does not exist: "
            "make it with fastllama prepare"
        )
    manifest = Manifest.load(folder)
    manifest.check_files(folder)
    tokenizer = manifest.open_tokenizer(folder)
    source = config.data.tokenizer
    if source and fingerprint(load_tokenizer(Path(source))) != manifest.tokenizer_fingerprint:
        raise ValueError(
            f"{folder} was not prepared with the tokenizer {source}; prepare the data again "
            "with this tokenizer, or set data.tokenizer to the tokenizer of the data."
        )
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
    train = TokenStream(folder, manifest, "train")
    if train.n_sequences(config.model.max_seq_len) < 1:
        raise ValueError(
            f"model.max_seq_len = {config.model.max_seq_len} is longer than the data, "
            f"{train.n_tokens} tokens in {folder}; prepare more text or lower model.max_seq_len."
        )
    prompt = encode_prompt(tokenizer, config.logging.sample_prompt, manifest.end_token_id)
    if len(prompt) >= config.model.max_seq_len:
        raise ValueError(
            f"logging.sample_prompt fills the {config.model.max_seq_len} tokens of a sequence and "
            "leaves no room for a sample; shorten it."
        )
    validation = None
    if "validation" in manifest.splits:
        stream = TokenStream(folder, manifest, "validation")
        validation = stream if stream.n_sequences(config.model.max_seq_len) else None
    return Dataset(folder, manifest, tokenizer, train, validation)
