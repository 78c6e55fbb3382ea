"""Statistics of a data folder, of one pass over its shards in bounded memory."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fastllama.console import Console, token_bar
from fastllama.data.manifest import CHECK_CHUNK_TOKENS, DataFolder, Manifest, damaged
from fastllama.data.tokenizer_variants import description, is_byte_level, unknown_id

PERCENTILES = (5, 25, 50, 75, 95, 99)
MOST_COMMON = 10
BAR_CHARACTERS = 40
MAX_TOKEN_CHARACTERS = 40


@dataclass
class TokenCounts:
    """The tokens of a split, counted. A document has the tokens up to its end token, included."""

    end_token_id: int
    ids: NDArray[np.int64]
    """Number of occurrences of each id, (vocab,)."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Number of documents of each length. `n` different lengths take at least `n**2 / 2` tokens,
    so that they fit into memory."""
    longest: int = 0
    longest_start: int = 0
    """Place of the first token of the longest document in the split."""
    unfinished: int = 0
    """Tokens after the last end token."""
    tokens: int = 0

    def add(self, ids: NDArray[np.integer]) -> None:
        """Count `ids`, which follow those that were counted before."""
        self.ids += np.bincount(ids, minlength=self.ids.size)
        stops = np.flatnonzero(ids == self.end_token_id) + 1
        if stops.size:
            lengths = np.diff(stops, prepend=-self.unfinished)
            values, counts = np.unique(lengths, return_counts=True)
            self.lengths.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            if values[-1] > self.longest:
                self.longest = int(values[-1])
                stop = int(stops[np.argmax(lengths)])
                self.longest_start = self.tokens + stop - self.longest
            self.unfinished = 0
        self.unfinished += ids.size - int(stops[-1] if stops.size else 0)
        self.tokens += ids.size


@dataclass(frozen=True)
class CommonToken:
    """A token that occurs often."""

    id: int
    text: str
    count: int


@dataclass(frozen=True)
class LengthBin:
    """The number of documents with `first` to `last` tokens, both included."""

    first: int
    last: int
    documents: int


@dataclass(frozen=True)
class SplitStatistics:
    """What a split holds. Lengths of documents are in tokens, with the end token."""

    tokens: int
    documents: int
    unfinished_tokens: int  # after the last end token
    text_bytes: int  # UTF-8
    unknown_tokens: int | None  # None if the tokenizer has no token for unknown text
    vocab_size: int
    unused_ids: int
    mean_length: float | None  # this and what follows: None or empty without documents
    longest: int | None
    longest_start: int | None  # place of its first token in the split
    length_percentiles: dict[int, int]
    length_histogram: tuple[LengthBin, ...]
    most_common: tuple[CommonToken, ...]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token: the compression by the tokenizer."""
        return self.text_bytes / self.tokens


def count_tokens(
    folder: DataFolder, manifest: Manifest, console: Console
) -> dict[str, TokenCounts]:
    """Read all shards of `folder` once, and count the tokens of each split.

    Raises:
        ValueError: a shard is missing or damaged.
        OSError: the disk fails.
    """
    total = sum(split.tokens for split in manifest.splits.values())
    started, done = time.monotonic(), 0
    found: dict[str, TokenCounts] = {}
    with token_bar(console) as bar:
        task = bar.add_task("", total=total, documents=0, tokens=0, rate=0.0)
        for name in manifest.splits:
            empty = np.zeros(manifest.vocab_size, np.int64)
            counts = found[name] = TokenCounts(manifest.end_token_id, empty)
            for ids in _chunks(folder, manifest, name):
                counts.add(ids)
                done += ids.size
                documents = sum(each.lengths.total() for each in found.values())
                rate = done / (time.monotonic() - started)
                bar.update(task, completed=done, documents=documents, tokens=done, rate=rate)
    return found


def statistics(
    manifest: Manifest, tokenizer: Tokenizer, counts: dict[str, TokenCounts]
) -> dict[str, SplitStatistics]:
    """The statistics of each split of a data folder."""
    content = description(tokenizer)
    unknown = unknown_id(content)
    # Other decoders drop the space at the beginning of a text.
    decodes = is_byte_level(content)
    found = {}
    for name, split in manifest.splits.items():
        counted = counts[name]
        n_documents = counted.lengths.total()
        common = np.argsort(-counted.ids, kind="stable")[:MOST_COMMON]
        found[name] = SplitStatistics(
            tokens=counted.tokens,
            documents=n_documents,
            unfinished_tokens=counted.unfinished,
            text_bytes=split.text_bytes,
            unknown_tokens=None if unknown is None else int(counted.ids[unknown]),
            vocab_size=manifest.vocab_size,
            unused_ids=int(np.count_nonzero(counted.ids == 0)),
            mean_length=(counted.tokens - counted.unfinished) / n_documents
            if n_documents
            else None,
            longest=counted.longest if n_documents else None,
            longest_start=counted.longest_start if n_documents else None,
            length_percentiles=_percentiles(counted.lengths),
            length_histogram=tuple(_histogram(counted.lengths)),
            most_common=tuple(
                CommonToken(number, _text_of(tokenizer, number, decodes), count)
                for number in common.tolist()
                if (count := int(counted.ids[number]))
            ),
        )
    return found


def report(split: SplitStatistics) -> Iterator[str]:
    """Yield the lines about a split."""
    yield f"  tokens      {split.tokens:,}"
    yield f"  documents   {split.documents:,}"
    if split.unfinished_tokens:
        yield f"  unfinished  {split.unfinished_tokens:,} tokens after the last end token"
    yield f"  text        {split.text_bytes:,} bytes, {split.bytes_per_token:.3f} per token"
    if split.unknown_tokens is not None:
        share = split.unknown_tokens / split.tokens
        yield f"  unknown     {split.unknown_tokens:,} tokens ({share:.4%})"
    used = split.vocab_size - split.unused_ids
    yield (
        f"  vocabulary  {used:,} of {split.vocab_size:,} ids occur, {split.unused_ids:,} never do"
    )
    if split.documents:
        percentiles = ", ".join(
            f"{percent}% {length:,}" for percent, length in split.length_percentiles.items()
        )
        yield f"  lengths     mean {split.mean_length:,.1f} tokens; {percentiles}"
        yield f"  longest     {split.longest:,} tokens, from token {split.longest_start:,} on"
        yield "  documents by length:"
        yield from _bars(split.length_histogram)
    yield "  most common tokens (id, share, text):"
    for token in split.most_common:
        share = token.count / split.tokens
        yield f"  {token.id:>8} {share:8.3%}  {token.text!r}"


def _chunks(folder: DataFolder, manifest: Manifest, split: str) -> Iterator[NDArray[np.integer]]:
    for shard in manifest.splits[split].shards:
        file = manifest.open_shard(folder, shard)
        for start in range(0, shard.tokens, CHECK_CHUNK_TOKENS):
            ids = file.read(start, min(CHECK_CHUNK_TOKENS, shard.tokens - start))
            if (largest := ids.max()) >= manifest.vocab_size:
                expected = f"ids below {manifest.vocab_size}"
                raise damaged(file.path, f"token id {largest}", expected)
            yield ids


def _percentiles(lengths: Counter[int]) -> dict[int, int]:
    """For each of `PERCENTILES`, the shortest length that so many documents do not exceed."""
    if not lengths:
        return {}
    values = sorted(lengths)
    below = np.cumsum([lengths[value] for value in values])
    ranks = [-(-percent * int(below[-1]) // 100) for percent in PERCENTILES]
    return {
        percent: values[int(np.searchsorted(below, rank))]
        for percent, rank in zip(PERCENTILES, ranks, strict=True)
    }


def _histogram(lengths: Counter[int]) -> Iterator[LengthBin]:
    """Yield bins from each power of two to the next, from the shortest to the longest length."""
    documents: Counter[int] = Counter()
    for length, count in lengths.items():
        documents[length.bit_length()] += count
    for bits in range(min(documents, default=1), max(documents, default=0) + 1):
        yield LengthBin(2 ** (bits - 1), 2**bits - 1, documents[bits])


def _bars(bins: tuple[LengthBin, ...]) -> Iterator[str]:
    most = max(each.documents for each in bins)
    width = len(f"{bins[-1].last:,}")
    for each in bins:
        bar = "#" * round(BAR_CHARACTERS * each.documents / most)
        lengths = f"{each.first:>{width},} to {each.last:>{width},}"
        yield f"  {lengths}  {each.documents:>12,}  {bar}".rstrip()


def _text_of(tokenizer: Tokenizer, number: int, decodes: bool) -> str:
    """The text of a token; without `decodes`, as the vocabulary spells it."""
    name = tokenizer.id_to_token(number) or ""
    text = tokenizer.decode([number], skip_special_tokens=False) if decodes else name
    return text[:MAX_TOKEN_CHARACTERS]
