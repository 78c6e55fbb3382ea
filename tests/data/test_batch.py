from pathlib import Path

import pytest
import torch

from fastllama.data.batch import IGNORED, fill_batch
from fastllama.data.stream import TokenStream
from tests.data.folder import make_stream

T = 3
N_SEQUENCES = 10


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    """Token i is i, in two shards."""
    return make_stream(tmp_path, range(17), range(17, N_SEQUENCES * T + 1))


@pytest.mark.parametrize("sequences", [[4, 0, 5, 4], [9, 5], range(7, 8), []], ids=str)
def test_targets_are_shifted_and_rows_padded(stream: TokenStream, sequences: list[int]) -> None:
    out = torch.full((2, 4, T), 77)
    fill_batch((stream.read(index, T) for index in sequences), out)
    n = len(sequences)
    first = torch.tensor(sequences, dtype=torch.int64)[:, None] * T
    assert torch.equal(out[0, :n], first + torch.arange(T))
    assert torch.equal(out[1, :n], out[0, :n] + 1)
    assert (out[0, n:] == 0).all()
    assert (out[1, n:] == IGNORED).all()


def test_ids_beyond_16_bits(tmp_path: Path) -> None:
    out = torch.empty(2, 1, 2, dtype=torch.int64)
    stream = make_stream(tmp_path, [1, 128_255, 70_000], dtype="uint32")
    fill_batch([stream.read(0, 2)], out)
    assert out.tolist() == [[[1, 128_255]], [[128_255, 70_000]]]


def test_more_sequences_than_rows(stream: TokenStream) -> None:
    with pytest.raises(IndexError):
        fill_batch((stream.read(index, T) for index in range(3)), torch.empty(2, 2, T).long())
