"""A prepared folder, opened for a run: refused at once where the two do not fit."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from fastllama.config import Config
from fastllama.data.manifest import Manifest
from fastllama.data.stream import TokenStream
from fastllama.data.tokenizer import fingerprint, load_tokenizer


@dataclass(frozen=True)
class Dataset:
    """Streams of a prepared folder and the tokenizer that made them."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream | None

    @property
    def validation_bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token of the held-out split stands for, on average."""
        split = self.manifest.splits["validation"]
        return split.text_bytes / split.tokens


def open_dataset(config: Config) -> Dataset:
    """Open `data.path` without reading the tokens.

    Raises:
        ValueError: the folder is missing, unfinished, damaged or another tokenizer's, or does not
            fit the model: more token ids than the vocabulary, fewer tokens than one update needs.
    """
    if not config.data.path:
        raise ValueError("data.path is empty; give the folder that `fastllama prepare` wrote.")
    folder = Path(config.data.path)
    manifest = Manifest.load(folder)
    manifest.check_files(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    for source in filter(None, (str(folder / "tokenizer.json"), config.data.tokenizer)):
        if fingerprint(load_tokenizer(Path(source))) != manifest.tokenizer_fingerprint:
            raise ValueError(
                f"{folder} was not prepared with the tokenizer {source}; prepare the data again "
                "with it, or point data.tokenizer at the one that was used."
            )
    if manifest.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the tokenizer's "
            f"{manifest.vocab_size} entries in {folder}; raise it to at least that."
        )
    train = TokenStream(folder, manifest, "train")
    if train.n_sequences(config.model.max_seq_len) < 1:
        raise ValueError(
            f"model.max_seq_len = {config.model.max_seq_len} is longer than the data, "
            f"{train.n_tokens} tokens in {folder}; prepare more text or shorten the sequences."
        )
    prompt = tokenizer.encode(config.logging.sample_prompt, add_special_tokens=False)
    if len(prompt.ids) >= config.model.max_seq_len:
        raise ValueError(
            f"logging.sample_prompt fills the {config.model.max_seq_len} tokens of a sequence and "
            "leaves nothing to write; shorten it."
        )
    validation = None
    if "validation" in manifest.splits:
        stream = TokenStream(folder, manifest, "validation")
        validation = stream if stream.n_sequences(config.model.max_seq_len) else None
    return Dataset(folder, manifest, tokenizer, train, validation)
