"""`data stats`: one vectorised pass against a plain computation in Python."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.console import Console
from fastllama.data import statistics as module
from fastllama.data.manifest import Manifest
from fastllama.data.statistics import (
    MOST_COMMON,
    PERCENTILES,
    SplitStatistics,
    TokenCounts,
    count_tokens,
    report,
    statistics,
)
from fastllama.data.statistics_plot import plot_counts
from fastllama.data.tokenizer import save_tokenizer
from fastllama.typed_json import DamagedFileError
from tests.data import foreign
from tests.data.folder import VOCAB_SIZE, make_folder
from tests.data.token_formats import END, write_npy

CONSOLE = Console(quiet=True)


def statistics_of(folder: Path) -> dict[str, SplitStatistics]:
    manifest = Manifest.load(folder)
    counts = count_tokens(folder, manifest, CONSOLE)
    return statistics(manifest, manifest.open_tokenizer(folder), counts)


def documents_of(tokens: list[int]) -> tuple[list[list[int]], list[int]]:
    """The documents with their end tokens, and the tokens after the last one."""
    documents: list[list[int]] = [[]]
    for token in tokens:
        documents[-1].append(token)
        if token == END:
            documents.append([])
    return documents[:-1], documents[-1]


def test_plain_computation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_CHUNK_TOKENS", 97)
    draw = np.random.default_rng(0)
    # Low ids are common, and the ids from 200 on never occur.
    tokens = np.minimum(draw.geometric(0.05, 3000), 199).tolist()
    shards = {"train": [tokens[:1000], tokens[1000:2500]], "validation": [tokens[2500:]]}
    make_folder(tmp_path, shards)
    found = statistics_of(tmp_path)
    assert found.keys() == shards.keys()
    for name, split in found.items():
        stream = [token for shard in shards[name] for token in shard]
        documents, rest = documents_of(stream)
        lengths = sorted(map(len, documents))
        assert split.tokens == len(stream)
        assert split.documents == len(documents) > 10
        assert split.unfinished_tokens == len(rest)
        assert split.bytes_per_token == 4.0
        assert split.unused_ids == VOCAB_SIZE - len(set(stream))
        assert split.mean_length == np.mean(lengths)
        assert split.longest == lengths[-1]
        start = split.longest_start
        assert start is not None
        assert stream[start : start + split.longest] in documents
        expected = np.quantile(lengths, np.array(PERCENTILES) / 100, method="inverted_cdf")
        assert list(split.length_percentiles.values()) == expected.tolist()
        for each in split.length_histogram:
            assert each.documents == sum(each.first <= n <= each.last for n in lengths)
        assert sum(each.documents for each in split.length_histogram) == len(documents)
        common = Counter(stream).most_common(MOST_COMMON)
        assert [each.count for each in split.most_common] == [count for _, count in common]
        assert all(stream.count(each.id) == each.count for each in split.most_common)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=9), max_size=9))
def test_any_chunks(chunks: list[list[int]]) -> None:
    counts = TokenCounts(END, np.zeros(5, np.int64))
    for chunk in chunks:
        counts.add(np.array(chunk, np.uint16))
    stream = [token for chunk in chunks for token in chunk]
    documents, rest = documents_of(stream)
    assert counts.ids.tolist() == [stream.count(number) for number in range(5)]
    assert counts.lengths == Counter(map(len, documents))
    assert (counts.tokens, counts.unfinished) == (len(stream), len(rest))
    if documents:
        longest = max(documents, key=len)
        assert counts.longest == len(longest)
        before = documents[: documents.index(longest)]
        assert counts.longest_start == sum(map(len, before))


def test_report(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": [[5, 6, 7, END, 70, 70, END, 70]]})
    assert list(report(statistics_of(tmp_path)["train"])) == [
        "  tokens      8",
        "  documents   2",
        "  unfinished  1 tokens after the last end token",
        "  text        32 bytes, 4.000 per token",
        "  vocabulary  5 of 260 ids occur, 255 never do",
        "  lengths     mean 3.5 tokens; 5% 3, 25% 3, 50% 3, 75% 4, 95% 4, 99% 4",
        "  longest     4 tokens, from token 0 on",
        "  documents by length:",
        "  2 to 3             1  ########################################",
        "  4 to 7             1  ########################################",
        "  most common tokens (id, share, text):",
        "        70  37.500%  'c'",
        "         1  25.000%  '<EOS>'",
        "         5  12.500%  '\"'",
        "         6  12.500%  '#'",
        "         7  12.500%  '$'",
    ]


def test_stream_without_documents(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": [[5, 6, 7]]})
    [split] = statistics_of(tmp_path).values()
    assert (split.documents, split.unfinished_tokens) == (0, 3)
    assert (split.longest, split.mean_length, split.length_histogram) == (None, None, ())
    assert not [line for line in report(split) if "length" in line]
    manifest = Manifest.load(tmp_path)
    plot_counts(count_tokens(tmp_path, manifest, CONSOLE), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_tokens_and_spaces(tmp_path: Path) -> None:
    """Texts are as the vocabulary spells them, where decoding would drop the space."""
    from fastllama.data.import_tokens import import_tokens

    made = foreign.unigram()
    save_tokenizer(made, tmp_path / "tokenizer.json")
    end = made.token_to_id("</s>")
    space = next(number for name, number in made.get_vocab().items() if name.startswith("▁"))
    path = tmp_path / "a.npy"
    np.save(path, np.array([0, space, 0, space, space, end]))
    import_tokens([str(path)], tmp_path / "tokenizer.json", tmp_path / "data")
    [split] = statistics_of(tmp_path / "data").values()
    assert split.unknown_tokens == 2
    assert split.most_common[0].text == made.id_to_token(space)
    assert "  unknown     2 tokens (33.3333%)" in list(report(split))


def test_id_outside_of_the_vocabulary(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": [[5, 6, END]]})
    path = write_npy(tmp_path / "train-00000", [[5, 400]])
    with pytest.raises(DamagedFileError, match=rf"{path.name} is damaged: found token id 400"):
        statistics_of(tmp_path)
