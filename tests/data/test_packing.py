"""Borders of documents: where they are, and how many have room."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastllama.config import Config, DataConfig, ModelConfig, TrainingConfig
from fastllama.data.batch import IGNORED
from fastllama.data.dataset import Dataset, Source
from fastllama.data.packing import Packing, document_room
from tests.data.folder import make_folder

END, OTHER = 1, 5
B, T = 2, 6


def batch_of(*rows: str) -> NDArray[np.int64]:
    """Inputs of `rows`, where | is the end token, and targets that are not ignored."""
    inputs = [[END if letter == "|" else OTHER for letter in row] for row in rows]
    return np.array([inputs, np.zeros_like(inputs)], np.int64)


@pytest.mark.parametrize(
    ("rows", "starts"),
    [
        (["aaaaaa", "aaaaaa"], [0, 6]),
        # The end token is the first input of a document; a sequence starts one in any case.
        (["aa|bbb", "bbbbbb"], [0, 2, 6]),
        (["|aaaaa", "aaaaa|"], [0, 6, 11]),
        # An empty document is its end token alone.
        (["a||||b", "|bbbbb"], [0, 1, 2, 3, 4, 6]),
    ],
)
def test_starts(rows: list[str], starts: list[int]) -> None:
    found = Packing(END, 8).cu_seqlens(batch_of(*rows))
    assert found.dtype == np.int32
    assert found.tolist() == starts + [B * T] * (9 - len(starts))


@given(st.lists(st.lists(st.sampled_from([END, OTHER]), min_size=T, max_size=T), min_size=1))
def test_borders_of_any_batch(inputs: list[list[int]]) -> None:
    found = Packing(END, 4).cu_seqlens(np.array([inputs, inputs], np.int64))
    flat = [token for row in inputs for token in row]
    expected = [at for at, token in enumerate(flat) if token == END or at % T == 0]
    assert found[: len(expected)].tolist() == expected
    assert set(found[len(expected) :].tolist()) == {len(flat)}
    # No document is longer than a sequence, so the kernels' bound of T holds.
    assert np.diff(found).max() <= T


@pytest.mark.parametrize(
    ("n_documents", "room"), [(1, 2), (2, 2), (3, 8), (8, 8), (9, 32), (33, 100), (100, 100)]
)
def test_few_lengths_have_room_for_all(n_documents: int, room: int) -> None:
    inputs = np.full((1, 100), OTHER, np.int64)
    inputs[0, :n_documents] = END
    found = Packing(END, 2).cu_seqlens(np.stack([inputs, inputs]))
    assert found.tolist() == [*range(n_documents), *[100] * (room + 1 - n_documents)]


def test_rows_without_a_sequence_are_one_document() -> None:
    batch = batch_of("aa|bbb", "||||||")
    batch[1, 1] = IGNORED
    assert Packing(END, 3).cu_seqlens(batch).tolist() == [0, 2, 6, 12]


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "tokens_per_document", "room"),
    [
        (8, 2048, 1000, 128),
        (1, 8192, 1000, 64),
        (4, 512, 10_000, 32),
        # One document for each token at most.
        (4, 8, 1, 32),
        (1, 8, 1e6, 8),
    ],
)
def test_room(batch_size: int, seq_len: int, tokens_per_document: float, room: int) -> None:
    assert document_room(batch_size, seq_len, tokens_per_document) == room


def test_packing_of_a_run(tmp_path: Path) -> None:
    manifest = make_folder(tmp_path, {"train": [[OTHER] * 999 + [END]]})
    train = dataclasses.replace(manifest.splits["train"], documents=10)
    longer = manifest.splits["train"]
    manifest = dataclasses.replace(manifest, splits={"train": train})
    sources = tuple(
        Source("", tmp_path, each, None, 0.0)  # type: ignore[arg-type]
        for each in (dataclasses.replace(manifest, splits={"train": longer}), manifest)
    )
    dataset = Dataset(sources, None, (), None, END)  # type: ignore[arg-type]
    config = Config(
        model=ModelConfig(max_seq_len=256),
        data=DataConfig(document_mask=True),
        training=TrainingConfig(batch_size=2),
    )
    # 2 + 16 + 4 * 512 / 100, of the source with the shorter documents.
    assert Packing.of(config, dataset) == Packing(END, 64)
    assert Packing.of(dataclasses.replace(config, data=DataConfig()), dataset) is None
