import itertools
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastllama.data.loader import BatchLoader
from fastllama.data.order import sequence_indices
from fastllama.data.packing import Packing
from fastllama.data.stream import TokenStream
from fastllama.data.training_data import TrainingData
from tests.data.folder import make_stream

T = 3
N_SEQUENCES = 10
SEED = 5
CPU = torch.device("cpu")


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    """Token i has id i, so the first input of a sequence gives its number."""
    return make_stream(tmp_path, range(17), range(17, N_SEQUENCES * T + 1))


def open_loader(stream: TokenStream, **options: Any) -> BatchLoader:
    data = TrainingData([stream], block_len=T, seed=SEED)
    return BatchLoader(data, **{"seq_len": T, "batch_size": 2, "device": CPU, **options})


def read(loader: BatchLoader, n_batches: int) -> list[list[int]]:
    """Sequence numbers of the next batches."""
    return [(loader.next()[0][:, 0] // T).tolist() for _ in range(n_batches)]


@pytest.mark.parametrize(
    ("batch_size", "world_size"), [(1, 1), (12, 1), (2, 3), (3, 2), (1, 4), (6, 2)]
)
def test_update_is_independent_of_ranks_and_batch_size(
    stream: TokenStream, batch_size: int, world_size: int
) -> None:
    n_updates, per_update, start = 3, 12, 7
    rounds = n_updates * per_update // (batch_size * world_size)
    columns = []
    for rank in range(world_size):
        with open_loader(
            stream, batch_size=batch_size, rank=rank, world_size=world_size, position=start
        ) as loader:
            columns.append(read(loader, rounds))
    order = [
        index for batches in zip(*columns, strict=True) for batch in batches for index in batch
    ]
    # 36 positions cross the ends of four epochs of 10.
    positions = np.arange(start, start + n_updates * per_update)
    assert order == sequence_indices(positions, N_SEQUENCES, SEED).tolist()


def test_targets_are_next_tokens(stream: TokenStream) -> None:
    with open_loader(stream) as loader:
        for _ in range(8):
            inputs, targets, sources, cu_seqlens = loader.next()
            assert sources is None
            assert cu_seqlens is None
            assert (inputs.dtype, inputs.shape) == (torch.int64, (2, T))
            assert torch.equal(targets, inputs + 1)
            assert torch.equal(inputs, inputs[:, :1] + torch.arange(T))


@pytest.mark.parametrize("on_cuda", [False, True])
def test_borders_of_documents(
    stream: TokenStream, monkeypatch: pytest.MonkeyPatch, on_cuda: bool
) -> None:
    if on_cuda:
        Cuda(monkeypatch)
    device = torch.device("cuda" if on_cuda else "cpu")
    # Token i has id i, so one sequence has an end token.
    packing = Packing(end_token_id=16, n_documents=2)
    lengths = set()
    with open_loader(stream, device=device, packing=packing, depth=2) as loader:
        for _ in range(8):
            inputs, targets, _, cu_seqlens = loader.next()
            assert cu_seqlens is not None
            expected = packing.cu_seqlens(torch.stack((inputs, targets)).numpy())
            # Long enough for the reader to fill every free slot.
            time.sleep(0.01)
            assert cu_seqlens.tolist() == expected.tolist()
            lengths.add(len(cu_seqlens))
    # The batch with three documents has a longer one.
    assert lengths == {3, 7}


def test_start_at_position(stream: TokenStream) -> None:
    with open_loader(stream) as whole, open_loader(stream, position=2 * 6) as late:
        assert read(whole, 10)[6:] == read(late, 4)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_batch_in_use_is_not_overwritten(stream: TokenStream, depth: int) -> None:
    with open_loader(stream, depth=depth) as loader:
        for _ in range(6):
            inputs, targets, *_ = loader.next()
            copies = inputs.clone(), targets.clone()
            # Long enough for the reader to fill every free slot.
            time.sleep(0.02)
            assert torch.equal(inputs, copies[0])
            assert torch.equal(targets, copies[1])


def test_next_raises_read_error(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read_sequence = itertools.count(), stream.read

    def failing_read(index: int, seq_len: int) -> NDArray[np.integer]:
        if next(reads) >= 4:
            raise OSError("the disk is gone")
        return read_sequence(index, seq_len)

    monkeypatch.setattr(stream, "read", failing_read)
    with open_loader(stream) as loader:
        # Batches read before the failure are still valid.
        read(loader, 2)
        with pytest.raises(OSError, match="the disk is gone"):
            loader.next()


@pytest.fixture
def slow_stream(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> TokenStream:
    read = stream.read

    def slow(index: int, seq_len: int) -> NDArray[np.integer]:
        time.sleep(0.02)
        return read(index, seq_len)

    monkeypatch.setattr(stream, "read", slow)
    return stream


def test_counts_wait_for_slow_reader(slow_stream: TokenStream) -> None:
    with open_loader(slow_stream, depth=1) as loader:
        assert loader.wait_seconds == 0
        read(loader, 3)
    # Six reads of 0.02 s, almost none of them ahead of use.
    assert 0.08 < loader.wait_seconds < 5


def test_read_ahead_hides_wait(slow_stream: TokenStream) -> None:
    with open_loader(slow_stream, depth=4) as loader:
        time.sleep(0.5)
        read(loader, 4)
    # The eight reads take 0.16 s.
    assert loader.wait_seconds < 0.08


class Stream:
    """A fake CUDA stream that records its calls."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.calls: list[str] = []

    def wait_event(self, event: "Event") -> None:
        # CUDA does not wait for an event that was never recorded.
        assert event.streams, "the event was never recorded"
        self.calls.append("wait")

    def synchronize(self) -> None:
        self.calls.append("synchronize")


class Event:
    """A fake CUDA event that lists the streams it was recorded on."""

    def __init__(self, blocking: bool = False) -> None:
        self.streams: list[Stream] = []
        self.blocking = blocking

    def record(self, stream: Stream) -> None:
        self.streams.append(stream)
        stream.calls.append("record")

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        assert self.blocking, "the reader would keep a core busy"


class Cuda:
    """Replaces CUDA by the CPU with fake streams and events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.training, self.copy = Stream(), Stream()
        empty, empty_like = torch.empty, torch.empty_like
        monkeypatch.setattr(
            torch, "empty", lambda *shape, pin_memory, **rest: empty(*shape, **rest)
        )
        monkeypatch.setattr(torch, "empty_like", lambda like, device: empty_like(like))
        for name, fake in {
            "Event": Event,
            "Stream": lambda device: self.copy,
            "current_stream": lambda device: self.training,
            "set_device": lambda device: None,
            "stream": lambda stream: nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_first_copy_waits_for_pending_kernels(
    stream: TokenStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Cuda(monkeypatch)
    with open_loader(stream, device=torch.device("cuda"), depth=3) as loader:
        assert cuda.training.calls == ["record"] * 3
        read(loader, 4)


@pytest.mark.parametrize("fails", [False, True])
def test_close_waits_for_copies(
    stream: TokenStream, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    cuda, reads, read_sequence = Cuda(monkeypatch), itertools.count(), stream.read

    def failing_read(index: int, seq_len: int) -> NDArray[np.integer]:
        if fails and next(reads) == 4:
            raise OSError("the disk is gone")
        return read_sequence(index, seq_len)

    monkeypatch.setattr(stream, "read", failing_read)
    with open_loader(stream, device=torch.device("cuda")) as loader:
        read(loader, 2)
    assert cuda.copy.calls.count("record") >= 2
    assert cuda.copy.calls[-1] == "synchronize"


def test_failed_training_waits_for_no_copy(
    stream: TokenStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, before = Cuda(monkeypatch), threading.active_count()

    def train_on_one_batch() -> None:
        with open_loader(stream, device=torch.device("cuda")) as loader:
            read(loader, 1)
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train_on_one_batch()
    assert "synchronize" not in cuda.copy.calls
    while threading.active_count() > before:
        time.sleep(0.01)


def test_close_waits_for_one_micro_batch(slow_stream: TokenStream) -> None:
    loader = open_loader(slow_stream, depth=200)
    loader.next()
    began = time.perf_counter()
    loader.close()
    # A micro-batch takes 0.04 s, and the ring 8 s.
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("n_batches", [0, 3])
def test_close_ends_thread(stream: TokenStream, n_batches: int) -> None:
    before = threading.active_count()
    with open_loader(stream) as loader:
        read(loader, n_batches)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
